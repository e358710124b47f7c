"""Dropout whose masks are not kept but drawn again, for the inputs of LoRA matrices.

A mask depends on the seed, the step, the example, the position and the layers that get the input,
and on nothing else: a step that is divided otherwise drops the same. A token's row of a mask is a
window into one long random sequence, and a hash says where it begins. Such a row is copied, where
torch's generators would draw each number: on a CPU that takes 15 times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BEGINS = 1 << 20  # places in the sequence where a row may begin: each a word
WORD = 8  # bytes, each of which is 0 or 1
WIDEST = 1 << 17  # numbers in a row
BYTES = WORD * BEGINS + WIDEST
# Odd constants of xxHash (Collet), as signed numbers.
FACTORS = -0x61C8864E7A143579, -0x3D4D51C2D82B14B1, 0x165667B19E3779F9


def keys_in_step(keys: torch.Tensor, step: int) -> torch.Tensor:
    """Those for `draw` of the same tokens in a step, int64."""
    return keys + _signed(step * FACTORS[1])


def _signed(number: int) -> int:
    """What is left of a number in 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _random(share: float, seed: int) -> torch.Tensor:
    """int64 words of `BYTES` in all, drawn on the host: the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(BYTES, dtype=torch.uint8).bernoulli_(1 - share, generator=generator)
    return drawn.view(torch.int64)


class Dropout:
    """The masks of all inputs in a model."""

    def __init__(self, share: float, seed: int, device: torch.device):
        """
        Args:
            share: of the numbers that are dropped, 0 to below 1.
        """
        self.share, self.inputs, self.part = share, 0, slice(None)
        self._sequence, self._begins = _random(share, seed).to(device) if share else None, None

    def add_input(self) -> int:
        """The number of another input, for `begins`."""
        self.inputs += 1
        return self.inputs - 1

    def draw(self, keys: torch.Tensor) -> None:
        """Masks are for these tokens, until their backward pass is over.

        Args:
            keys: int64 [rows, tokens], a number for each token that no other one has.
        """
        inputs = torch.arange(1, self.inputs + 1, device=keys.device) * FACTORS[0]
        hashed = keys * FACTORS[2] + inputs[:, None, None]
        for factor in FACTORS[1:]:
            hashed = (hashed ^ (hashed >> 31)) * factor
        self._begins = ((hashed >> 32) & (BEGINS - 1)).int()

    def begins(self, number: int) -> torch.Tensor:
        """Where the rows of an input begin, for `rows`: int32 [all tokens]."""
        return self._begins[number][:, self.part].flatten()

    def rows(self, begins: torch.Tensor, width: int) -> torch.Tensor:
        """uint8 [len(begins), width]: 0 where a number is dropped, else 1."""
        # In words: kernels count in 32 bits then, where the sequence and its windows allow it.
        sequence = self._sequence.to(begins.device)  # where it is, but for tensors without values
        windows = sequence.as_strided((BEGINS, -(-width // WORD)), (1, 1))
        return windows.index_select(0, begins).view(torch.uint8)[:, :width]

    @contextmanager
    def only(self, tokens: slice) -> Iterator[None]:
        """Meanwhile, masks are for these tokens of each row."""
        before, self.part = self.part, tokens
        try:
            yield
        finally:
            self.part = before
