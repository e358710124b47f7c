"""Products of frozen weights with LoRA matrices beside them, in few operators and little memory.

peft computes x·W + s·drop(x)·A·B for each layer by itself: it casts and drops the whole input,
keeps it with the mask, and scales and adds results as wide as the layer's. Here layers that share
an input drop it once, the scale is applied at rank size, a product adds its result itself, and of
what is wide only the input is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import linear

from llama_lora.model.frozen_weight import dense
from llama_lora.train.compute.dropout import Dropout


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer with one plain LoRA adapter: A [r, in], B [out, r], and its scale."""

    base: torch.nn.Module
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float


@dataclass(frozen=True)
class Input:
    """What adapted layers share: [tokens, in], and where the rows of its dropout mask begin."""

    x: torch.Tensor
    dropout: Dropout | None
    begins: torch.Tensor | None

    @cached_property
    def mask(self) -> torch.Tensor:
        return self.dropout.rows(self.begins, self.x.shape[1])

    @property
    def dropped(self) -> torch.Tensor:
        """Without what is dropped, and not scaled up for that: `scale` does that at rank size."""
        return self.x if self.dropout is None else self.x * self.mask

    @property
    def scale(self) -> float:
        return 1.0 if self.dropout is None else 1 / (1 - self.dropout.share)


class Products(torch.autograd.Function):
    """The results of adapted layers that share an input: [tokens, out] each."""

    @staticmethod
    def forward(ctx, x, layers, masks, *matrices):
        """
        Args:
            x: [tokens, in]
            layers: `Adapted`; `matrices` are their A and B in turn.
            masks: `Dropout` and where rows begin, or None twice.
        """
        ctx.layers, ctx.masks = layers, masks
        inner = at_rank(Input(x, *masks), matrices)
        ctx.save_for_backward(x, inner, *matrices)
        return results(Input(x, *masks), layers, inner, matrices)

    @staticmethod
    def backward(ctx, *upstream):
        x, inner, *matrices = ctx.saved_tensors
        given = Input(x, *ctx.masks), ctx.layers, inner, matrices
        of_x, of_matrices = gradients(*given, upstream, ctx.needs_input_grad[0])
        return of_x, None, None, *of_matrices


def at_rank(given: Input, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The products with all A matrices, side by side: [tokens, ranks]."""
    return linear(given.dropped, _stacked(matrices, given.x.dtype))


def results(given: Input, layers, inner, matrices) -> tuple[torch.Tensor, ...]:
    """The result of each layer, from what `at_rank` returns."""
    found = []
    for layer, part, b in zip(layers, _parts(inner, matrices), matrices[1::2], strict=True):
        bias = None if layer.base.bias is None else layer.base.bias.to(given.x.dtype)
        whole = linear(given.x, dense(layer.base, given.x.dtype), bias)
        scale = layer.scale * given.scale
        found.append(whole.addmm_(part, b.to(given.x.dtype).t(), alpha=scale))
    return tuple(found)


def gradients(given: Input, layers, inner, matrices, upstream, of_input: bool) -> tuple:
    """The gradient of the input, None if not asked for `of_input`, and those of the matrices."""
    dtype, of_x, of_b = given.x.dtype, None, []
    of_inner = torch.empty_like(inner)
    parts = zip(_parts(inner, matrices), _parts(of_inner, matrices), strict=True)
    for layer, b, above, (part, of_part) in zip(
        layers, matrices[1::2], upstream, parts, strict=True
    ):
        options = {"beta": 0, "alpha": layer.scale * given.scale}  # so that the sum is a product
        b = b.to(dtype)
        torch.addmm(of_part, above, b, **options, out=of_part)
        of_b.append(torch.addmm(b, above.t(), part, **options))
        if of_input:
            if of_x is None:
                of_x = above @ dense(layer.base, dtype)
            else:
                of_x.addmm_(above, dense(layer.base, dtype))
    of_a = of_inner.t() @ given.dropped
    if of_input and given.dropout is None:
        of_x.addmm_(of_inner, _stacked(matrices, dtype))
    elif of_input:
        of_x.addcmul_(of_inner @ _stacked(matrices, dtype), given.mask)
    pairs = zip(_parts(of_a, matrices, 0), of_b, strict=True)
    return of_x, [matrix for pair in pairs for matrix in pair]


def _stacked(matrices, dtype: torch.dtype) -> torch.Tensor:
    """All A matrices, one below the other: [ranks, in]."""
    first, *others = (a.to(dtype) for a in matrices[::2])
    return torch.cat([first, *others]) if others else first


def _parts(ranks: torch.Tensor, matrices, dim: int = 1) -> tuple[torch.Tensor, ...]:
    """The columns, or rows, of each layer."""
    return ranks.split([len(a) for a in matrices[::2]], dim)
