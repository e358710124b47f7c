"""Keeps each checkpointed layer's input in the host's memory until its backward pass.

It leaves the card on a stream of its own while the next layers compute, and comes back one layer
before it is needed. transformers' `activation_checkpointing_enable(offload=True)`, which is torch's
`save_on_cpu`, copies on the computing stream, which has to wait.
"""

import weakref
from collections import deque

import torch
from torch.autograd.graph import saved_tensors_hooks

LEAST = 1 << 20  # bytes; smaller tensors stay
BLOCK = 16 << 20  # bytes of pinned memory
ON_THE_WAY = 2  # tensors that leave or come back at the same time
PINNED_SHARE = 0.6  # of the host's free memory, at most: what is pinned cannot be swapped


def may_pin(free: int, processes: int) -> int:
    """Bytes that each of the processes on a host may pin, of so many that are free."""
    return int(PINNED_SHARE * free) // processes


def pinned_bytes(tensors: int, size: int) -> int:
    """Bytes of pinned memory that so many tensors of `size` bytes take."""
    return tensors * -(-size // BLOCK) * BLOCK if size >= LEAST else 0


class Offload(saved_tensors_hooks):
    """Context in which the large contiguous tensors that autograd saves are kept on the host.

    Enter it around the call of a checkpointed layer; checkpointing's own hooks make sure that only
    the layer's inputs are saved. On a CPU it does the same as on a card, but saves no memory.
    """

    def __init__(self, device: torch.device):
        super().__init__(self._pack, self._unpack)
        self.torch_device = torch.get_device_module(device)  # torch.cuda, or torch.cpu
        self.copying = self.torch_device.Stream()
        self.host = HostMemory(pinned=device.type == "cuda")
        self.waiting = weakref.WeakValueDictionary()  # OnHost by number
        self.on_the_way = deque()  # OnHost whose copy the computing stream has not waited for yet
        self.count = 0

    @torch.no_grad()
    def _pack(self, tensor: torch.Tensor):
        small = tensor.nbytes < LEAST
        if small or isinstance(tensor, torch.nn.Parameter) or not tensor.is_contiguous():
            return tensor
        self._wait_for_all_but(ON_THE_WAY - 1)
        self.count += 1
        packed = OnHost(self.count, tensor, self.host)
        self._copy(packed, packed.copy_out)
        self.waiting[packed.number] = packed
        return packed

    @torch.no_grad()
    def _unpack(self, packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._fetch(packed)
        self._computing().wait_event(packed.copied)
        self.on_the_way.remove(packed)
        tensor, packed.on_card = packed.on_card, None
        if before := self.waiting.get(packed.number - 1):
            self._fetch(before)
        return tensor

    def _fetch(self, packed) -> None:
        """Start copying it back, unless it is still on the card or already on its way."""
        if packed.on_card is None:
            self._wait_for_all_but(ON_THE_WAY - 1)
            # Allocated for the computing stream, which frees it after using it.
            packed.on_card = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
            self._copy(packed, packed.copy_back)

    def _copy(self, packed, copy) -> None:
        """Start the copy once the computations queued so far are done."""
        self.copying.wait_stream(self._computing())
        with self.torch_device.stream(self.copying):
            copy()
        packed.copied = self.copying.record_event()
        self.on_the_way.append(packed)

    def _wait_for_all_but(self, most: int) -> None:
        """Take the oldest off the card; memory that a copy still reads or writes is not freed.

        When a new pass begins, this also clears what an aborted backward pass had ordered.
        """
        while len(self.on_the_way) > most:
            packed = self.on_the_way.popleft()
            self._computing().wait_event(packed.copied)
            packed.on_card = None

    def _computing(self):
        return self.torch_device.current_stream()


class OnHost:
    """A tensor in the host's memory; `on_card` while it is still there or on its way back."""

    def __init__(self, number: int, tensor: torch.Tensor, host: "HostMemory"):
        self.number, self.on_card, self.copied = number, tensor, None
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.blocks = host.take(tensor.nbytes)
        weakref.finalize(self, host.free.extend, self.blocks)

    def copy_out(self) -> None:
        for block, piece in self._pieces():
            block.copy_(piece, non_blocking=True)

    def copy_back(self) -> None:
        for block, piece in self._pieces():
            piece.copy_(block, non_blocking=True)

    def _pieces(self):
        pieces = self.on_card.view(-1).view(torch.uint8).split(BLOCK)
        return [
            (block[: len(piece)], piece) for block, piece in zip(self.blocks, pieces, strict=True)
        ]


class HostMemory:
    """Blocks of one size, used again and again: those of one tensor fit any other.

    Pinned memory is slow to allocate, and torch rounds each piece of it up to a power of two.
    """

    def __init__(self, pinned: bool):
        self.pinned, self.free = pinned, []

    def take(self, size: int) -> list[torch.Tensor]:
        """Blocks with room for `size` bytes; whoever takes them must put them back into `free`.

        All copies are made on one stream, so a block can be reused before its old content has been
        copied out.
        """
        count = -(-size // BLOCK)
        while len(self.free) < count:
            self.free.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.pinned))
        taken = self.free[-count:]
        del self.free[-count:]
        return taken
