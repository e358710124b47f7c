"""Weights-only 8 bits beside LLM.int8: how far each is from the unquantized base, and how fast.

make demo && python3 -m benchmarks.model.eight_bits --write

LLM.int8 is forced where bitsandbytes itself dequantizes, in training on a CPU, since that is what
it does on a card.
"""

import argparse
import os
import time
from functools import partial

from benchmarks import pages
from benchmarks.model.rounding import loaded, parser, read, relative

WIDTHS, ROWS = (576, 4096), (1, 16, 512)
ROUNDS = 12
RANK = 16
THRESHOLD = 6.0  # of outliers, transformers' default


def parse_args() -> argparse.Namespace:
    return parser(__doc__, "eight-bits.md", pieces=8, length=256).parse_args()


def main(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    origin = pages.origin()  # before the dtype of this machine is switched
    examples = pieces(args)
    exact = gradients(args, "none", [examples])
    rows = [
        {"8 bits": "weights only, here", **errors(args, examples, exact, lambda model: None)},
        {"8 bits": "LLM.int8", **errors(args, examples, exact, llm_int8)},
    ]
    measured = list(products())
    pages.publish(
        args,
        "Why 8 bits are weights only",
        WHY,
        f"{origin}.",
        pages.table(rows, left=1),
        MEANING.format(pieces=len(examples), tokens=sum(len(one.ids) for one in examples)),
        "## How long a product takes",
        pages.table(measured, left=3),
        SPEED,
        slower(measured),
    )


WHY = """\
bitsandbytes' own 8-bit product, LLM.int8, rounds the activations to 8 bits as well, except for
columns in which some row of the same call has an outlier. So a token's result depends on what else
is in its micro-batch; the product needs a card of compute capability 7.5; and it asks the card for
the outliers, which empties its queue at every layer. Here the weight alone is in 8 bits, with
bitsandbytes' codes, and the activations stay as they are: for a product the weight is dequantized
to the dtype that is computed in, forward and backward. In training the numbers are those of
bitsandbytes' own training on a CPU, bit for bit, and the same on every device but for the rounding
of that dtype."""

MEANING = """\
Both in fp32 on the demo's base (SmolLM2-135M), with LoRA matrices of rank 16 off their zero, on
{pieces} pieces of the demo's chats with {tokens:,} tokens, as shares of the norm: how far the
gradients of all LoRA matrices are from those over the unquantized base; and how far they are from
each other if the pieces share a row or are computed one by one. LLM.int8 is forced here, as cards
compute it.
How far a layer's output is off, and what 4 bits make of it: [cards.md](cards.md)."""

SPEED = """\
In milliseconds, of a square weight, without gradients, the best of several rounds in which all take
their turn. "dequantized by bitsandbytes" is what it trains with on a CPU. On a CPU, up to 16 rows
without gradients, such as the token of an answer, are multiplied with the codes themselves, and the
result is scaled: in bf16 by a kernel of PyTorch's, in fp32 piece by piece. For more rows, and in
training, the weight is dequantized piece by piece into memory that is used again. A card
dequantizes it each time, for a single token, too."""


def slower(rows: list[dict]) -> str:
    """Where weights-only is slower than LLM.int8, and by how much at most."""
    ratios = [(float(row["here"]) / float(row["LLM.int8"]), row) for row in rows]
    most, row = max(ratios, key=lambda pair: pair[0])
    count = sum(ratio > 1 for ratio, _ in ratios)
    return (
        f"It is slower than LLM.int8 in {count} of these {len(rows)} rows, by {most:.1f} times at "
        f"most ({row['width']} wide, {row['rows']} rows in {row['dtype']})."
    )


def pieces(args: argparse.Namespace) -> list:
    """Examples of the demo's chats."""
    from llama_lora.train.data.example import Example

    return [
        Example(str(n), "", ids[0].numpy(), labels[0].numpy())
        for n, (ids, labels) in enumerate(read(args))
    ]


def errors(args: argparse.Namespace, examples: list, exact: list, change) -> dict[str, str]:
    """The errors of a product: `change` makes a base compute with it."""
    packed = gradients(args, "8bit", [examples], change)
    apart = gradients(args, "8bit", [[one] for one in examples], change)
    return {
        "gradients, from the unquantized base": f"{relative(packed, exact):.3g}",
        "packed and one by one": f"{relative(apart, packed):.2g}",
    }


def gradients(args, quantization: str, batches: list[list], change=lambda model: None) -> list:
    """The gradients of LoRA's matrices, summed over micro-batches of examples, in fp32."""
    import torch

    from llama_lora.model import adapter
    from llama_lora.train.compute import chunked_loss, packed_attention
    from llama_lora.train.data.packing import collate

    os.environ["LLAMA_LORA_DTYPE"] = "float32"
    base = loaded(args.base, quantization)
    base.set_attn_implementation(packed_attention.BY_EXAMPLE)
    chunked_loss.compute_in_chunks(base)
    torch.manual_seed(0)  # the same matrices over every base
    model = adapter.attach(base, RANK, 2 * RANK, 0.0, ["all-linear"])
    matrices = [parameter for _, parameter in adapter.trainable(model)]
    for matrix in matrices:
        torch.nn.init.normal_(matrix, std=0.01)
    change(model)
    total = [torch.zeros_like(matrix) for matrix in matrices]
    for examples in batches:
        batch = collate([examples])
        del batch["names"]
        loss = model(**batch, num_items_in_batch=1, use_cache=False).loss
        torch._foreach_add_(total, torch.autograd.grad(loss, matrices))
    return total


def llm_int8(model) -> None:
    """Let the 8-bit layers of `model` compute as bitsandbytes does on a card."""
    from llama_lora.model.int8_linear import Int8Linear

    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.forward = partial(own_product, "MatMul8bitLt", module)


def own_product(kind: str, linear, x):
    """bitsandbytes' product with the weight of an 8-bit layer."""
    from bitsandbytes.autograd import _functions

    state = _functions.MatmulLtState()
    state.CB, state.SCB = linear.weight.data, linear.weight.SCB
    state.has_fp16_weights, state.threshold = False, THRESHOLD
    return getattr(_functions, kind).apply(x, linear.weight, None, None, state)


def products():
    """Rows of the table: milliseconds of each kind of product by width, dtype and rows."""
    import torch

    for width in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            plain, quantized = layers(width, dtype)
            forms = {
                "unquantized": plain,
                "LLM.int8": partial(own_product, "MatMul8bitLt", quantized),
                "dequantized by bitsandbytes": partial(own_product, "MatMul8bitFp", quantized),
                "here": quantized,
            }
            for rows in ROWS:
                x = torch.randn(rows, width).to(dtype)
                found = times(forms, x)
                told = {name: f"{1e3 * seconds:.2f}" for name, seconds in found.items()}
                kind = str(dtype).removeprefix("torch.")
                yield {"width": f"{width:,}", "dtype": kind, "rows": rows, **told}


def layers(width: int, dtype):
    """A linear layer in `dtype`, and the same in 8 bits."""
    import bitsandbytes
    import torch

    from llama_lora.model import int8_linear

    plain = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
    quantized = bitsandbytes.nn.Linear8bitLt(width, width, False, has_fp16_weights=False)
    quantized.load_state_dict(plain.state_dict())
    with int8_linear.quantized_alike():
        quantized.to("cpu")
    int8_linear.use_in(quantized)
    return plain.to(dtype), quantized


def times(forms: dict, x) -> dict[str, float]:
    """The least seconds of each, taking turns."""
    import torch

    least = dict.fromkeys(forms, float("inf"))
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, compute in forms.items():
                started = time.perf_counter()
                compute(x)
                least[name] = min(least[name], time.perf_counter() - started)
    return least


if __name__ == "__main__":
    main(parse_args())
