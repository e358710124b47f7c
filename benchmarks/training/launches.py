"""How many kernels a micro-batch starts on a card, counted without one.

python3 -m benchmarks.training.launches

The gradients of a micro-batch of a 7B base in 16 bits, checked and handed over to the optimizer, on
tensors without values, whose operators are counted: those that start a kernel on a card, as often
as they do. Where torch has a kernel of its own for cards, and composes what it does elsewhere, that
is counted. LoRA matrices are in 16 bits, as DeepSpeed trains them.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks import pages
from benchmarks.operators import Counted

# A 7B, but narrow: that changes no count.
LAYERS, VOCABULARY = 32, 32000
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
EXAMPLES = (512,) * 4  # tokens of each, all labelled
DTYPE = torch.float16
DROPOUT = 0.05
NO_KERNELS = (
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"),
    *("aten::new_empty_strided", "aten::detach", "aten::lift_fresh", "aten::set_", "aten::resize_"),
)
# dQ's sums cleared, the sums over dO · O, the pass itself, and dQ cast to 16 bits.
SEVERAL = {"torch_attn::_varlen_attn_backward": 4}
LISTS = 110, 64, 48, 36, 30  # tensors of 1, 2, … lists that a kernel takes at a time


class Launches(Counted):
    """Counts the kernels that operators start, by operator."""

    def times(self, name: str, args: tuple) -> int:
        if name.startswith("aten::_foreach"):
            lists = [arg for arg in args if isinstance(arg, list | tuple) and arg]
            return -(-len(lists[0]) // LISTS[min(len(lists), len(LISTS)) - 1])
        return 0 if name in NO_KERNELS else SEVERAL.get(name, 1)


@contextmanager
def as_on_a_card(launches: Launches) -> Iterator[None]:
    """Meanwhile dropout and RMSNorm are single operators, as they are on a card."""
    functions = torch.nn.functional
    before = functions.dropout, functions.rms_norm

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            launches.names["aten::_fused_rms_norm"] += 1
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx, upstream):
            launches.names["aten::_fused_rms_norm_backward"] += 1
            return torch.empty_like(upstream)

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p else x

    functions.dropout, functions.rms_norm = dropout, lambda x, *_: Norm.apply(x)
    try:
        yield
    finally:
        functions.dropout, functions.rms_norm = before


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    return parser.parse_args()


def main() -> None:
    print(text())


def text() -> str:
    rows = []
    for quantization in ("8bit", "none"):
        for recompute in (False, True):
            ours, plain = (counted(quantization, recompute, own) for own in (True, False))
            rows.append(
                {
                    "base": {"8bit": "8 bits", "none": "16 bits"}[quantization],
                    "layers recompute": "all" if recompute else "none",
                    "peft's and transformers' own": f"{plain:,}",
                    "ours": f"{ours:,}",
                    "share": f"{ours / plain:.0%}",
                }
            )
    tokens = sum(EXAMPLES)
    return f"{MEANING.format(tokens=tokens, layers=LAYERS)}\n\n{pages.table(rows)}"


MEANING = """\
## Kernels on a card

How many kernels a micro-batch of {tokens:,} tokens starts on a card of capability 8.0 for a base of
{layers} layers, with LoRA on all linear layers: its gradients, the check that they are finite, and
handing them over. They are counted on tensors without values, with the same attention and the same
loss on both sides."""


def counted(quantization: str, recompute: bool, own: bool) -> int:
    """The kernels of a micro-batch; without `own`, peft and transformers compute the layers."""
    from llama_lora.train.compute import attention_kernels
    from llama_lora.train.compute.attention_kernels import VARLEN
    from llama_lora.train.memory.out_of_memory import Gradients
    from llama_lora.train.stopping import all_finite

    model = without_values(quantization, recompute, own)
    parameters = [one for one in model.parameters() if one.requires_grad]
    gradients = Gradients(parameters, print)

    def loss_of(part: dict) -> torch.Tensor:
        # With a mask: without values, transformers cannot see whether positions restart.
        more = {"attention_mask": torch.ones_like(part["input_ids"])}
        return model(**part, **more, num_items_in_batch=sum(EXAMPLES)).loss

    with attention_kernels.only(VARLEN), Launches() as launches, as_on_a_card(launches):
        gradients.compute(loss_of, micro_batch(), scale=1024.0)
        launches.names.clear()  # among others, of what is made once
        loss, found = gradients.compute(loss_of, micro_batch(), scale=1024.0)
        all_finite([loss, *found])
        gradients.as_loss(found).backward()
    return launches.names.total()


def without_values(quantization: str, recompute: bool, own: bool):
    """The base with LoRA on all linear layers, as training loads it, and then on no device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_lora.model.base import load_base
    from llama_lora.train import lora_model
    from llama_lora.train.memory import gradient_checkpointing

    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
        base = load_base(folder, quantization, DTYPE, "cpu")
    model = lora_model.adapted(base, 16, 32, DROPOUT, ["all-linear"]).train()
    if not own:
        for module in base.model.modules():
            vars(module).pop("forward", None)
    gradient_checkpointing.checkpoint(base, list(base.model.layers) if recompute else [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPE)
    return moved_to_meta(model)


def moved_to_meta(model):
    """The model on the meta device, with weights in 8 bits as well."""
    from llama_lora.model.int8_linear import Int8Linear

    for module in model.modules():
        if isinstance(module, Int8Linear):  # whose parameter does not move there
            codes, scales = module.weight.data.to("meta"), module.weight.SCB.to("meta")
            module.weight = torch.nn.Parameter(codes, requires_grad=False)
            module.weight.SCB = scales
    return model.to("meta")


def micro_batch() -> dict:
    from llama_lora.train.data.example import Example
    from llama_lora.train.data.packing import collate

    ids = [np.arange(count, dtype=np.int32) for count in EXAMPLES]
    batch = collate([[Example(str(n), "", row, row) for n, row in enumerate(ids)]])
    del batch["names"]
    return {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}


if __name__ == "__main__":
    parse_args()
    main()
