"""Small computations that show whether training's kernels run on a device, and run correctly."""

import warnings
from collections import OrderedDict
from contextlib import nullcontext

import bitsandbytes
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llama_lora.model import int8_linear
from llama_lora.model.base import keep_nf4_layout
from llama_lora.train.compute import attention_kernels
from llama_lora.train.compute.packed_attention import attend_within_examples

# The largest error, relative to fp32, by precision of the base and by dtype.
TOLERANCES = {"8bit": 0.02, "4bit": 0.1, "none": 0.02}
ATTENTION_ERROR = 0.02
STEP_ERROR = 0.05

ATTENTION_KERNELS = {
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}

AT_ONCE = {name: kernel for kernel, name in attention_kernels.NAMES.items()}

WIDTH, TOKENS, RANK = 256, 128, 8
HEAD_SIZE = 64
EXAMPLES, WINDOW = [300, 37, 1, 90], 50  # tokens; a window leaves out whole blocks of keys


class WrongResult(Exception):
    """A computation ran, but its result differs from that of fp32."""


def base_error(quantization: str, dtype: torch.dtype, device: str, watch=None) -> float:
    """Train one linear layer with LoRA for one step; returns its distance from fp32 on the CPU.

    Args:
        quantization: of the frozen weights: "8bit", "4bit" or "none" (`dtype`), as in `load_base`.
        dtype: what the layer computes in.
        watch: a context around the step itself.

    Returns:
        The largest relative error of the output and of the gradients of input, A and B.

    Raises:
        WrongResult: that is beyond `TOLERANCES`, or a gradient is zero or not finite.
        RuntimeError: the device has no kernel for this.
    """
    exact = torch.float32, "cpu"
    expected = _step(_adapted("none", *exact), *exact, nullcontext())
    found = _step(_adapted(quantization, dtype, device), dtype, device, watch or nullcontext())
    return _largest_error(found, expected, TOLERANCES[quantization])


def codes_compared(device: str) -> str:
    """How many codes of an 8-bit weight differ from those that bitsandbytes' own kernel gives."""
    weight = _input(WIDTH, WIDTH).half().to(device)
    own, _, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.clone())
    differ = int((own != int8_linear.quantize(weight)[0]).sum())
    return f"torch dequantizes; {differ:,} of {own.numel():,} codes differ from bitsandbytes' own"


def attention_error(kernel: str, dtype: torch.dtype, device: str) -> float:
    """As `base_error`, for causal attention by one of `ATTENTION_KERNELS`, forward and backward."""
    expected = _attend(SDPBackend.MATH, torch.float32, "cpu")
    found = _attend(ATTENTION_KERNELS[kernel], dtype, device)
    return _largest_error(found, expected, ATTENTION_ERROR)


def at_once_error(kernel: str, dtype: torch.dtype, device: str) -> float:
    """As `base_error`, for all examples of a row in one call by one of `AT_ONCE`.

    With a window and without, queries in groups; beside one example after the other.
    """
    errors = []
    for window in (None, WINDOW):
        with attention_kernels.only(attention_kernels.LOOP):
            expected = _attend_to_row(window, torch.float32, "cpu")
        with attention_kernels.only(AT_ONCE[kernel]):
            found = _attend_to_row(window, dtype, device)
        errors.append(_largest_error(found, expected, ATTENTION_ERROR))
    return max(errors)


def optimizer_error(device: str) -> float:
    """A few steps of AdamW with 8-bit states; returns their distance from fp32's on the CPU."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = AdamW8bit if device == "cpu" else PagedAdamW8bit  # paging needs CUDA
    expected = _moved(torch.optim.AdamW, "cpu")
    return _largest_error([_moved(kind, device)], [expected], STEP_ERROR)


def _adapted(quantization: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A linear layer with LoRA matrices, always the same except for the base's precision."""
    from peft import LoraConfig, inject_adapter_in_model

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    linear = _linear(quantization, dtype)
    linear.load_state_dict({"weight": normal(WIDTH, WIDTH).to(dtype)})
    with int8_linear.quantized_alike():
        model = torch.nn.Sequential(OrderedDict(linear=linear)).to(device)
    model.is_loaded_in_8bit = quantization == "8bit"  # this tells peft
    model.is_loaded_in_4bit = quantization == "4bit"
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=["linear"])
    inject_adapter_in_model(config, model)
    keep_nf4_layout(model)
    int8_linear.use_in(model)
    for matrix in _matrices(model):
        matrix.data = normal(*matrix.shape).to(device)
    return model


def _linear(quantization: str, dtype: torch.dtype) -> torch.nn.Linear:
    if quantization == "8bit":
        return bitsandbytes.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
    if quantization == "4bit":
        kind = {"quant_type": "nf4", "compress_statistics": True}
        return bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=dtype, **kind)
    return torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)


def _step(model: torch.nn.Module, dtype: torch.dtype, device: str, watch) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of A and B.

    It comes after an evaluation, as in training, since an evaluation may leave something behind.
    """
    inputs = _input(1, TOKENS, WIDTH).to(device).requires_grad_()
    mixed = dtype != torch.float32
    autocast = torch.autocast(device.partition(":")[0], dtype if mixed else None, enabled=mixed)
    with autocast:
        model.eval()(inputs.detach())
    with watch:
        with autocast:
            output = model.train()(inputs)
        output.float().square().mean().backward()
    return [output.detach(), inputs.grad, *(matrix.grad for matrix in _matrices(model))]


def _matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _moved(optimizer, device: str) -> torch.Tensor:
    """How far four steps, each with another gradient, move a matrix."""
    matrix = torch.nn.Parameter(torch.zeros(RANK, 16 * WIDTH, device=device))
    stepping = optimizer([matrix], lr=0.01)
    for gradient in _input(4, *matrix.shape):
        matrix.grad = gradient.to(device)
        stepping.step()
    return matrix.detach()


def _attend(backend: SDPBackend, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """The output, and the gradients of queries, keys and values."""
    parts = _input(3, 1, 4, TOKENS, HEAD_SIZE).to(device, dtype).unbind()
    parts = [part.requires_grad_() for part in parts]
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each reason why a kernel is not for this device
        output = scaled_dot_product_attention(*parts, is_causal=True)
    output.float().square().mean().backward()
    return [output.detach(), *(part.grad for part in parts)]


def _attend_to_row(window: int | None, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """The output, and the gradients of queries, keys and values."""
    row = _input(1, sum(EXAMPLES), 8, HEAD_SIZE).to(device, dtype).transpose(1, 2)
    parts = [part.detach().requires_grad_() for part in row.split([4, 2, 2], 1)]
    output, _ = attend_within_examples(None, *parts, window, example_lengths=EXAMPLES)
    output.float().square().mean().backward()
    return [output.detach(), *(part.grad for part in parts)]


def _input(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _largest_error(found, expected, tolerance: float) -> float:
    errors = []
    for value, reference in zip(found, expected, strict=True):
        value = value.float().cpu()
        if not value.isfinite().all() or not value.any():
            raise WrongResult("a result is zero or not finite")
        errors.append(((value - reference).norm() / reference.norm()).item())
    if max(errors) > tolerance:
        raise WrongResult(f"{max(errors):.1%} from fp32, expected at most {tolerance:.0%}")
    return max(errors)
