"""Which kernels a computation uses, by the operators that run."""

from torch.utils._python_dispatch import TorchDispatchMode

# What `scaled_dot_product_attention` turns into, and the kernels for all examples of a row; the
# plain kernel has no operator of its own.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention": "FlashAttention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "FlashAttention",
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
    "torch_attn::_varlen_attn": "FlashAttention",
    "aten::_efficient_attention_forward": "memory-efficient",
    "aten::_safe_softmax": "plain",
    "aten::_softmax": "plain",
}
BITSANDBYTES = "bitsandbytes::"


class Operators(TorchDispatchMode):
    """Collects the `names` of the operators that run under it: "aten::mm", "bitsandbytes::…"."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


def attention(names: set[str]) -> str:
    """The kernels of attention among these operators."""
    return ", ".join(sorted({ATTENTION[name] for name in names & ATTENTION.keys()})) or "none"


def bitsandbytes(names: set[str]) -> str:
    """bitsandbytes' operators among these, for the products with a quantized base."""
    own = sorted(name for name in names if name.startswith(BITSANDBYTES))
    return "bitsandbytes' " + ", ".join(name.removeprefix(BITSANDBYTES) for name in own)
