"""Linear layers with frozen weights in 8 bits, dequantized for each product, on every device.

Codes and scales are bitsandbytes'. Its own product, LLM.int8 (Dettmers et al. 2022), also rounds
the activations, each by what shares a call with it, and needs a card of compute capability 7.5.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import bitsandbytes
import torch
from torch.nn.functional import linear

from llama_lora.hardware.device import autocast

LARGEST = 127  # of the codes
PIECE = 1 << 18  # weights that a core's cache holds while they are dequantized
CARD_PIECE = 1 << 24  # few calls, and 64 MiB in fp32
FEW = 16  # rows: on a CPU, more are faster with the whole weight dequantized

_kept = threading.local()  # buffers by dtype


class Int8Linear(bitsandbytes.nn.Linear8bitLt):
    """A product of activations in their own dtype with the weight dequantized to that dtype.

    Its backward pass dequantizes the weight again, so no activation is saved for it.
    """

    @property
    def steps(self) -> torch.Tensor:
        """fp32 [out, 1]; times the int8 codes of `weight`, they are the weights."""
        scales, steps = self.__dict__.get("_steps", (None, None))
        if scales is not self.weight.SCB:  # those of another weight, or device
            scales = self.weight.SCB
            steps = scales[:, None] * (1 / LARGEST)
            self.__dict__["_steps"] = scales, steps
        return steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (x,) = autocast(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight.data, self.steps
        if torch.is_grad_enabled():
            return _Product.apply(x, *weight, bias)
        few = 0 < x.numel() <= FEW * x.shape[-1]
        if few and x.device.type == "cpu" and x.dtype != torch.float16:
            return _few_rows(x, *weight, bias)
        return linear(x, dequantized(*weight, x.dtype), bias)


def use_in(model: torch.nn.Module) -> None:
    """Let all 8-bit layers of `model` compute as `Int8Linear`."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.__class__ = Int8Linear


def dequantized(codes: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`codes` × `steps`, rounded once; on a CPU it is overwritten by this thread's next call."""
    if codes.device.type != "cpu":
        whole = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        return torch.mul(codes, steps, out=whole)
    whole, rows = _buffer(codes.shape, dtype), _rows(codes, PIECE)
    in_pieces = (all.split(rows) for all in (whole, codes, steps))
    for piece, of_codes, of_steps in zip(*in_pieces, strict=True):
        in_fp32 = piece if dtype == torch.float32 else _buffer(piece.shape, torch.float32)
        in_fp32.copy_(of_codes).mul_(of_steps)
        if in_fp32 is not piece:
            piece.copy_(in_fp32)
    return whole


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Codes and scales of `weight`, as from bitsandbytes' kernel in plain torch.

    Its kernel for cards divides approximately, so that some codes would depend on the device.

    Args:
        weight: fp16 [out, in].

    Returns:
        int8 [out, in], fp32 [out] of which a 127th is a step, and None, where bitsandbytes' kernel
        has the columns of outliers.
    """
    scales = weight.abs().amax(1).float()
    codes = torch.empty_like(weight, dtype=torch.int8)
    per_step = LARGEST / scales[:, None].clamp(min=torch.finfo(torch.float32).tiny)
    rows = _rows(weight, PIECE if weight.device.type == "cpu" else CARD_PIECE)
    for piece, *given in zip(*(all.split(rows) for all in (codes, weight, per_step)), strict=True):
        piece.copy_(torch.mul(*given).round_())
    return codes, scales, None


@contextmanager
def quantized_alike() -> Iterator[None]:
    """Meanwhile bitsandbytes quantizes 8-bit weights with `quantize`, on whatever device."""
    own = bitsandbytes.functional.int8_vectorwise_quant
    bitsandbytes.functional.int8_vectorwise_quant = quantize
    try:
        yield
    finally:
        bitsandbytes.functional.int8_vectorwise_quant = own


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, steps, bias):
        # Not saved for checkpointing to find: a layer stops recomputing at its last saved tensor.
        ctx.weight = codes, steps
        return linear(x, dequantized(codes, steps, x.dtype), bias)

    @staticmethod
    def backward(ctx, upstream):
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight = dequantized(*ctx.weight, upstream.dtype)
        rows = upstream.reshape(-1, upstream.shape[-1])
        of_x = (rows @ weight).view(*upstream.shape[:-1], weight.shape[1])
        return of_x, None, None, None


def _few_rows(x: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor, bias) -> torch.Tensor:
    """The product with the codes themselves, whose results are scaled."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if _packs(rows, codes):
        product = torch.ops.aten._weight_int8pack_mm(rows, codes, rows.new_ones(len(codes)))
    else:
        pieces = codes.split(_rows(codes, PIECE))
        product = [linear(rows, _buffer(piece.shape, x.dtype).copy_(piece)) for piece in pieces]
        product = torch.cat(product, 1)
    product *= steps[:, 0]
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], len(codes))


def _packs(rows: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether torch's kernel may be called, which is fast in bf16 alone.

    It loads 16 numbers at a time from aligned addresses (int8mm_kernel.cpp), and checks neither.
    """
    aligned = not (rows.shape[1] % 16 or rows.data_ptr() % 32 or codes.data_ptr() % 16)
    return rows.dtype == torch.bfloat16 and aligned


def _rows(weight: torch.Tensor, piece: int) -> int:
    """How many rows of `weight` make a piece."""
    return max(1, piece // weight.shape[1])


def _buffer(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Memory of this thread, used again and again: fresh memory costs more than what fills it."""
    kept = _kept.__dict__.get(dtype)
    if kept is None or len(kept) < shape.numel():
        with torch.inference_mode(False):
            kept = _kept.__dict__[dtype] = torch.empty(shape.numel(), dtype=dtype)
    return kept[: shape.numel()].view(shape)
