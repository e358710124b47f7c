"""Activation checkpointing (Chen et al. 2016): which layers keep activations for backward.

Recomputing a layer adds a third to its training time, so only as many do it as memory requires.
"""

import weakref

import psutil
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_lora.cli import InputError
from llama_lora.hardware.cards import GIB
from llama_lora.hardware.device import processes_here
from llama_lora.train.memory import tiled_mlp
from llama_lora.train.memory.activation_offload import PINNED_SHARE, Offload, may_pin, pinned_bytes
from llama_lora.train.memory.allocator import HOLES, give_back_large_blocks

PROBE_TOKENS = 128
SHARE = 0.85  # of the free memory; the rest is for the kernels' workspaces and fragmentation
TILE = 2048  # tokens that keep any card busy


def set_up(
    model, wanted: str, tokens: int, offload="auto", mlp_tiles="auto", reserved: float = 0
) -> str:
    """Turn checkpointing on for the layers that need it; returns a line that says how many.

    Args:
        wanted: "True" for all layers, "False" for none, "auto" for as few as memory allows.
        tokens: the most that are computed at once.
        offload: whether inputs of checkpointed layers wait in the host's memory; "auto": if all
            layers are checkpointed and it does not fit otherwise.
        mlp_tiles: into how many tiles the MLPs of checkpointed layers cut that many tokens; "auto":
            tiles of `TILE` tokens.
        reserved: bytes that training will allocate besides.

    Raises:
        InputError: offloading is asked for, and the host has too little memory.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    every = len(layers)
    on_card = model.device.type == "cuda"
    asks = wanted == "auto" or (wanted == "True" and offload == "auto" and on_card)
    needed = _needed(model, layers, tokens, reserved) if asks else 0
    few = every if offload == "True" else min(needed, every)
    count = {"True": every, "False": 0}.get(wanted, few)
    host = _offload(model, count, tokens, offload, crowded=needed > every)
    checkpoint(model, layers[:count], host)
    if count and not on_card:
        give_back_large_blocks()
    tile = TILE if mlp_tiles == "auto" else -(-tokens // int(mlp_tiles))
    tiled = tiled_mlp.set_up(model, layers[:count], tile) and tile < tokens
    said = f"gradient checkpointing in {count} of {every} layers"
    if host:
        said += ", with their inputs in the host's memory"
    if tiled:
        said += f", their MLPs in tiles of {tile:,} tokens"
    return said


def _offload(model, layers: int, tokens: int, wanted: str, crowded: bool) -> Offload | None:
    """Offloading of the inputs of so many layers, if `wanted`, or needed with "auto"."""
    on_card = model.device.type == "cuda"
    if not (on_card and layers and {"auto": crowded}.get(wanted, wanted == "True")):
        return None
    size = pinned_bytes(layers, tokens * model.config.hidden_size * model.dtype.itemsize)
    free, processes = host_memory(), processes_here()
    if size <= may_pin(free, processes):
        return Offload(model.device)
    if wanted == "auto":
        return None
    each = f" in each of {processes} processes" if processes > 1 else ""
    raise InputError(
        f"--offload_activations True: needs {size / GIB:.1f} GiB of pinned memory on the host"
        f"{each}, expected at most {may_pin(free, processes) / GIB:.1f} GiB, since only "
        f"{PINNED_SHARE:.0%} of the {free / GIB:.1f} GiB that are free may be pinned; use a "
        "shorter --model_max_length"
    )


def checkpoint(model, chosen: list, offload: Offload | None = None) -> None:
    """Let the `chosen` layers of `model` recompute; with `offload`, from inputs on the host."""
    if chosen:
        # Reentrant checkpointing needs inputs that require gradients, which a frozen base lacks.
        model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = layer in chosen
    if offload:
        for layer in chosen:
            layer._gradient_checkpointing_func = _within(
                offload, layer._gradient_checkpointing_func
            )


def _within(offload: Offload, checkpoint):
    def checkpoint_and_offload(function, *args):
        with offload:
            return checkpoint(function, *args)

    return checkpoint_and_offload


def _needed(model, layers: list, tokens: int, reserved: float) -> int:
    """How many layers have to recompute so that a micro-batch of `tokens` fits.

    If even all are not enough, it is more than there are.
    """
    per_token, fixed = layer_bytes(model, layers)
    per_layer = per_token * tokens + fixed
    inputs = tokens * model.config.hidden_size * model.dtype.itemsize
    share = SHARE if model.device.type == "cuda" else SHARE / (1 + HOLES[model.dtype.itemsize])
    free = free_memory() * share - reserved - inputs * len(layers) - 2 * per_layer
    return len(layers) - max(-1, min(len(layers), int(free // per_layer)))


def layer_bytes(model, layers: list) -> tuple[float, float]:
    """Bytes that a layer keeps for backward: per token, and for any number of them; measured.

    It is measured with one layer at a time: DoRA unfolds weights, and few of them fit into memory.
    """
    lengths = PROBE_TOKENS, 2 * PROBE_TOKENS
    checkpoint(model, layers)
    recomputing = [_kept(model, tokens) for tokens in lengths]
    checkpoint(model, layers[1:])
    short, long = (
        _kept(model, tokens) - less for tokens, less in zip(lengths, recomputing, strict=True)
    )
    per_token = (long - short) / PROBE_TOKENS
    return per_token, max(0, short - per_token * PROBE_TOKENS)


def _kept(model, tokens: int) -> int:
    """Bytes that wait for the backward pass of that many tokens."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    cards = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cards), LiveBytes() as live:
        model.train()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = live.bytes
        del loss
    return kept


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what is computed under it and still held, on any device, and their peak.

    Hooks on saved tensors would miss what quantized layers keep outside of autograd.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, set()

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
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, where, size)

    def _release(self, where: int, size: int) -> None:
        self.known.discard(where)
        self.bytes -= size


def free_memory() -> int:
    """Bytes that can still be allocated on the card or, without a card, on the host."""
    if torch.cuda.is_available():
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + idle
    return host_memory()


def host_memory() -> int:
    """Bytes that can still be allocated on the host."""
    return psutil.virtual_memory().available
