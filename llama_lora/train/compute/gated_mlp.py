"""MLPs with a gate that keep gate and up for the backward pass, and compute the rest again."""

from functools import partial

import torch

from llama_lora.hardware.device import autocast
from llama_lora.train.compute import lora_layers
from llama_lora.train.compute.lora_products import Input, at_rank, gradients, results

PARTS = "gate_proj", "up_proj", "down_proj", "act_fn"
ALIKE = 0.01  # of the largest result: the rounding of 16 bits


def gated_mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    """down(act(gate(x)) · up(x)): [rows, tokens, hidden] -> the same shape."""
    gate, up = autocast(mlp.gate_proj(x), mlp.up_proj(x))
    alone = lora_layers.by_itself(mlp.down_proj, gate)
    if alone is None:
        return mlp.down_proj(Gated.apply(gate, up, mlp.act_fn))
    rows = gate.flatten(0, -2), up.flatten(0, -2)
    return alone.apply(GatedProduct, *rows, mlp.act_fn).unflatten(0, x.shape[:-1])


class Gated(torch.autograd.Function):
    """act(gate) · up."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx, upstream):
        gate, up = ctx.saved_tensors
        return *_gradients(*_activated(ctx.act, gate), up, upstream), None


class GatedProduct(torch.autograd.Function):
    """The product of act(gate) · up with an adapted layer: `lora_products.Products` of it."""

    @staticmethod
    def forward(ctx, gate, up, act, layers, masks, *matrices):
        ctx.act, ctx.layers, ctx.masks = act, layers, masks
        given = Input(act(gate).mul_(up), *masks)
        inner = at_rank(given, matrices)
        ctx.save_for_backward(gate, up, inner, *matrices)
        return results(given, layers, inner, matrices)[0]

    @staticmethod
    def backward(ctx, upstream):
        gate, up, inner, *matrices = ctx.saved_tensors
        gate, activated = _activated(ctx.act, gate)
        given = Input(activated.detach() * up, *ctx.masks)
        of_x, of_matrices = gradients(given, ctx.layers, inner, matrices, (upstream,), True)
        del given
        of_gate, of_up = _gradients(gate, activated, up, of_x, out=of_x)
        return of_gate, of_up, None, None, None, *of_matrices


def _activated(act, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate as a leaf, and act(gate) with a graph of its own."""
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        return gate, act(gate)


def _gradients(gate, activated, up, of_product, out=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of gate and up; `out` is memory that may be overwritten."""
    of_up = of_product * activated.detach()
    (of_gate,) = torch.autograd.grad(activated, gate, torch.mul(of_product, up, out=out))
    return of_gate, of_up


def set_up(model) -> None:
    """Let the MLPs of `model` compute so that compute the same: Llama's, and most others'."""
    proven = {}
    for module in model.modules():
        if not all(hasattr(module, name) for name in PARTS):
            continue
        kind = type(module), type(module.act_fn)
        if kind not in proven:
            proven[kind] = _is_same(module, model.dtype)
        if proven[kind]:
            module.forward = partial(gated_mlp, module)


@torch.no_grad()
def _is_same(mlp, dtype: torch.dtype) -> bool:
    """Whether `gated_mlp` gives what `mlp` does, but for rounding."""
    training, device = mlp.training, next(mlp.parameters()).device
    mlp.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, mlp.gate_proj.in_features, generator=generator).to(device, dtype)
    own, ours = type(mlp).forward(mlp, x), gated_mlp(mlp, x)
    mlp.train(training)
    return bool((own - ours).abs().max() <= ALIKE * own.abs().max())  # so that NaN fails, too
