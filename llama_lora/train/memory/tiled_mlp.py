"""An MLP that takes the tokens a tile at a time, so that its activations exist for one tile only.

Between its products an MLP is several times as wide as the hidden states, and its LoRA matrices
also keep their inputs after dropout. Arctic Long Sequence Training (Bekman et al. 2025) recomputes
it tile by tile in the backward pass. DeepSpeed's `TiledMLP` does that with a backward pass that
adds to the parameters' `.grad`; here their gradients are returned, as `torch.autograd.grad` needs
them.
"""

import contextlib

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

# Layers in which only the MLP uses the output of the norm before it.
NORM_BEFORE_MLP = ("llama", "mistral", "qwen2", "qwen3")


def set_up(model, layers: list, size: int) -> bool:
    """Let the MLPs of `layers`, with the norms before them, take `size` tokens at a time.

    Tokens do not depend on each other there, so the result is the same, except for the order in
    which the weights' gradients are summed.

    Returns:
        Whether any layer does so now: none in a model whose norms may have other uses.
    """
    if model.config.model_type not in NORM_BEFORE_MLP:
        return False
    for layer in layers:
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        steps = [type(module).forward.__get__(module) for module in (norm, mlp)]
        norm.forward, mlp.forward = _pass, _Tiles(steps, mlp, size)
    return bool(layers)


def _pass(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


class _Tiles:
    """`steps` one after the other, a tile at a time: [rows, tokens, hidden] -> the same shape."""

    def __init__(self, steps: list, mlp, size: int):
        self.steps, self.size = steps, size
        self.parameters = [p for p in mlp.parameters() if p.requires_grad]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] <= self.size:
            return self.run(hidden)
        if torch.is_grad_enabled() and hidden.requires_grad:
            kept = _Keep.apply(hidden)
            return _Tiled.apply(self, kept.grad_fn, kept, *self.parameters)
        return torch.cat([self.run(tile) for tile in hidden.split(self.size, 1)], 1)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            hidden = step(hidden)
        return hidden


class _Keep(torch.autograd.Function):
    """Saves what `_Tiled` recomputes from, before it computes.

    A checkpointed layer stops recomputing once it has the last tensor that it had saved, so it does
    not compute the tiles in vain.
    """

    @staticmethod
    def forward(ctx, hidden):
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, upstream):
        return upstream


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiles, keep, hidden, *parameters):
        ctx.tiles, ctx.keep, ctx.parameters = tiles, keep, parameters
        ctx.as_now = _Circumstances(hidden)
        result = torch.empty_like(hidden)
        for tile, place in zip(
            hidden.split(tiles.size, 1), result.split(tiles.size, 1), strict=True
        ):
            place.copy_(tiles.run(tile))
        return result

    @staticmethod
    def backward(ctx, upstream):
        (hidden,) = ctx.keep.saved_tensors
        gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in ctx.parameters]
        tiles = (whole.split(ctx.tiles.size, 1) for whole in (hidden, upstream, gradient))
        with ctx.as_now.again():
            for tile, above, place in zip(*tiles, strict=True):
                _add_gradients(ctx, tile, above, place, sums)
        found = [total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True)]
        return None, None, gradient, *found


def _add_gradients(ctx, tile, above, place, sums: list) -> None:
    """Recompute a tile; put its gradient in `place`, and add the weights' gradients to `sums`."""
    tile = tile.detach().requires_grad_()
    with torch.enable_grad():
        result = ctx.tiles.run(tile)
    of_tile, *of_weights = torch.autograd.grad(result, (tile, *ctx.parameters), above)
    place.copy_(of_tile)
    for total, one in zip(sums, of_weights, strict=True):
        total.add_(one)


class _Circumstances:
    """The present random state and autocast, to compute something again later."""

    def __init__(self, tensor: torch.Tensor):
        self.device = tensor.device.type
        self.on_host, self.on_cards = torch.get_rng_state(), get_device_states(tensor)
        self.autocast = {
            "enabled": torch.is_autocast_enabled(self.device),
            "dtype": torch.get_autocast_dtype(self.device),
        }

    @contextlib.contextmanager
    def again(self):
        devices, states = self.on_cards
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.on_host)
            set_device_states(devices, states)
            # Without its cache, which would give a tile the cast weights of another tile's graph.
            with torch.autocast(self.device, cache_enabled=False, **self.autocast):
                yield
