"""MLPs with a gate that keep gate and up for the backward pass, and compute the rest again."""

import ast
import functools
import inspect
import textwrap

import torch

from llama_lora.hardware.device import autocast
from llama_lora.train.compute import lora_layers
from llama_lora.train.compute.lora_products import Input, at_rank, gradients, results

FORWARD = "self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))"


def gated_mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    """down(act(gate(x)) · up(x)): [rows, tokens, hidden] -> the same shape."""
    gate, up = autocast(mlp.gate_proj(x), mlp.up_proj(x))
    arguments = lora_layers.arguments_of(mlp.down_proj, gate)
    if arguments is None:
        return mlp.down_proj(Gated.apply(gate, up, mlp.act_fn))
    rows = gate.flatten(0, -2), up.flatten(0, -2)
    return GatedProduct.apply(*rows, mlp.act_fn, *arguments).unflatten(0, x.shape[:-1])


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
    """Let the MLPs of `model` compute so whose forward pass is that: Llama's, and most others'."""
    for module in model.modules():
        if _is_gated(type(module)):
            module.forward = functools.partial(gated_mlp, module)


@functools.cache
def _is_gated(kind: type) -> bool:
    """Whether the forward pass of a class is `FORWARD` and nothing else, by its source.

    By value, limits and the like would go unnoticed with inputs that do not reach them.
    """
    if not kind.__name__.endswith("MLP"):
        return False
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    _, x, *others = [argument.arg for argument in function.args.args] + [None] * 2
    *before, last = function.body
    steps = [ast.unparse(step) for step in before if not isinstance(step, ast.Expr)]
    result = ast.unparse(last)
    if len(steps) == 1 and result.startswith("return "):  # of a name for the result
        name = result.removeprefix("return ")
        steps, result = [], steps[0].replace(f"{name} = ", "return ", 1)
    return not steps and not any(others) and result == f"return {FORWARD.format(x=x)}"
