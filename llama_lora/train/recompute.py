"""Activation checkpointing (Chen et al. 2016): which layers keep their activations for backward.

Recomputing a layer costs a third of its training time again, so no more of them do it than memory
asks for.
"""

import weakref

import psutil
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

PROBE_TOKENS = 256
SHARE = 0.85  # of the free memory; the rest is for the kernels' workspaces and fragmentation


def set_up(model, wanted: str, tokens: int) -> str:
    """Turn checkpointing on for the layers that need it, and say for how many.

    Args:
        wanted: "True" for all layers, "False" for none, "auto" for as few as memory allows.
        tokens: the most that a micro-batch holds.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    count = {"True": len(layers), "False": 0}.get(wanted)
    if count is None:
        count = _needed(model, layers, tokens)
    if count:
        # Reentrant checkpointing needs inputs that require gradients, which a frozen base lacks.
        model.activation_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
    return f"gradient checkpointing in {count} of {len(layers)} layers"


def _needed(model, layers: list, tokens: int) -> int:
    """How many layers have to recompute for a micro-batch of `tokens` to fit."""
    kept = activation_bytes(model) * tokens  # by all layers, if none recomputes
    per_layer = kept / len(layers)
    inputs = tokens * model.config.hidden_size * model.dtype.itemsize
    free = free_memory() * SHARE - inputs * len(layers) - 2 * per_layer
    return len(layers) - max(0, min(len(layers), int(free // per_layer)))


def activation_bytes(model) -> float:
    """Bytes that the layers of `model` keep for the backward pass, per token; measured."""
    ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=model.device)
    cards = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cards), LiveBytes() as live:
        model.train()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = live.bytes
        del loss
    return kept / PROBE_TOKENS


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what is computed under it and still held, on any device.

    Hooks on saved tensors would miss what quantized layers keep by their own means.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.known = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            where = storage.data_ptr()
            if where and where not in self.known | given:
                self._hold(storage, where)
        return result

    def _hold(self, storage, where: int) -> None:
        size = storage.nbytes()
        self.known.add(where)
        self.bytes += size
        weakref.finalize(storage, self._release, where, size)

    def _release(self, where: int, size: int) -> None:
        self.known.discard(where)
        self.bytes -= size


def free_memory() -> int:
    """Bytes that can still be allocated on the card, or without one on the host."""
    if torch.cuda.is_available():
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + idle
    return psutil.virtual_memory().available
