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

from llama_lora.hardware.device import without_autocast
from llama_lora.train.compute import lora_layers

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
    undo(layers)
    for layer in layers:
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        norm.forward, mlp.forward = _pass, _Tiles([norm.forward, mlp.forward], mlp, size)
    return bool(layers)


def undo(layers: list) -> None:
    """Let the MLPs of `layers` take all tokens at once again."""
    for layer in layers:
        if isinstance(layer.mlp.forward, _Tiles):
            layer.post_attention_layernorm.forward, layer.mlp.forward = layer.mlp.forward.steps


def _pass(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


class _Tiles:
    """`steps` one after the other, a tile at a time: [rows, tokens, hidden] -> the same shape."""

    def __init__(self, steps: list, mlp, size: int):
        self.steps, self.size = steps, size
        self.parameters = [p for p in mlp.parameters() if p.requires_grad]
        self.dropout = lora_layers.dropout_of(mlp)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.shape[1]
        if tokens <= self.size:
            return self.run(hidden, slice(None))
        if torch.is_grad_enabled() and hidden.requires_grad:
            kept = _Keep.apply(hidden)
            return _Tiled.apply(self, kept.grad_fn, kept, *self.parameters)
        return torch.cat([self.run(hidden[:, tile], tile) for tile in self.tiles(tokens)], 1)

    def tiles(self, tokens: int) -> list[slice]:
        return [slice(start, start + self.size) for start in range(0, tokens, self.size)]

    def run(self, hidden: torch.Tensor, tile: slice) -> torch.Tensor:
        """The results for these of the tokens, of which `hidden` is the input."""
        with self.dropout.only(tile) if self.dropout else contextlib.nullcontext():
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
        for tile in tiles.tiles(hidden.shape[1]):
            result[:, tile] = tiles.run(hidden[:, tile], tile)
        return result

    @staticmethod
    def backward(ctx, upstream):
        (hidden,) = ctx.keep.saved_tensors
        gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in ctx.parameters]
        with ctx.as_now.again():
            for tile in ctx.tiles.tiles(hidden.shape[1]):
                gradient[:, tile] = _add_gradients(ctx, hidden, upstream, tile, sums)
        found = [total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True)]
        return None, None, gradient, *found


def _add_gradients(ctx, hidden, upstream, tile: slice, sums: list) -> torch.Tensor:
    """The gradient of a tile, which is recomputed; those of the weights are added to `sums`."""
    given = hidden[:, tile].detach().requires_grad_()
    with torch.enable_grad():
        result = ctx.tiles.run(given, tile)
    with without_autocast(hidden.device.type):  # as backward passes are
        found = torch.autograd.grad(result, (given, *ctx.parameters), upstream[:, tile])
    of_tile, *of_weights = found
    for total, one in zip(sums, of_weights, strict=True):
        total.add_(one)
    return of_tile


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
