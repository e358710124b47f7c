"""Micro-batches of whole examples without padding: no computation is wasted."""

import random
import zlib
from collections.abc import Callable

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from llama_lora.cli import InputError
from llama_lora.model.labels import IGNORE
from llama_lora.train.compute import attention_check
from llama_lora.train.data.bin_packing import best_fit_decreasing
from llama_lora.train.data.example import Example

EPOCH_STRIDE = 1_000_003  # so that neighbouring seeds do not share epochs


class MicroBatches(torch.utils.data.Dataset):
    """The micro-batches of an epoch, each a list of examples, in the order of training.

    Each epoch has its own packing and order. They depend only on the seed and the epoch, so a
    resumed run sees what the uninterrupted one would have seen.
    """

    def __init__(
        self,
        examples,
        max_length: int,
        size: int,
        packing: bool = True,
        seed: int = 0,
        processes: int = 1,
        accumulation: int = 1,
    ):
        """
        Args:
            examples: a sequence of `Example`, with their `lengths` in tokens.
            size: a micro-batch holds up to `size` × `max_length` tokens.
            packing: whether examples share that room freely; if not, a micro-batch is `size`
                examples, and all those of an optimizer step have about the same length.
            processes: how many train at the same time. Empty micro-batches even them out, so that
                all take the same number of steps and none repeats an example.
            accumulation: micro-batches per optimizer step in each process.
        """
        self.examples, self.capacity = examples, size * max_length
        self.size, self.packing, self.seed, self.processes = size, packing, seed, processes
        self.group = size * processes * accumulation
        self.lengths = np.asarray(examples.lengths)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Arrange the micro-batches of an epoch; the Trainer calls this at the start of each."""
        seed = self.seed + EPOCH_STRIDE * epoch
        self.members = self._packed(seed) if self.packing else self._grouped_by_length(seed)
        self.members += [[]] * (-len(self.members) % self.processes)

    def _packed(self, seed: int) -> list[list[int]]:
        shuffle = random.Random(seed).shuffle
        order = list(range(len(self.examples)))
        shuffle(order)
        packed = best_fit_decreasing(self.lengths[order].tolist(), self.capacity)
        shuffle(packed)
        return [[order[i] for i in members] for members in packed]

    def _grouped_by_length(self, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        lengths = self.lengths.tolist()
        order = get_length_grouped_indices(lengths, self.group, generator=generator)
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.examples[i] for i in self.members[index]]

    @property
    def fullest(self) -> int:
        """Tokens in the fullest micro-batch of this epoch."""
        return int(self.most(np.sum))

    def most(self, size: Callable[[np.ndarray], int]) -> int:
        """The most that `size` makes of the examples' lengths in a micro-batch of this epoch."""
        return max(size(self.lengths[members]) for members in self.members if members)

    @property
    def fill(self) -> float:
        """The share of the micro-batches' room that holds tokens; the rest costs nothing."""
        used = sum(members != [] for members in self.members)
        return int(self.lengths.sum()) / (used * self.capacity)


EMPTY = Example("", "", np.zeros(1, np.int32), np.full(1, IGNORE, np.int32))


def collate(micro_batches: list[list[Example]]) -> dict:
    """The examples of a micro-batch in a single row, one after the other, without padding.

    Args:
        micro_batches: one micro-batch in a list, as the loader passes it.

    Returns:
        int64 `input_ids`, `labels` and `position_ids` of [1, tokens]; `example_lengths`, by which
        `attend_within_examples` keeps the examples apart; where the `labelled` tokens are, int64,
        and how many each example has; int64 `token_keys`, a number for each token that depends on
        its example and position alone; and the examples' `names`.
    """
    (examples,) = micro_batches
    examples = examples or [EMPTY]
    # Nothing comes before an example's first token, so that token is not learned.
    labels = [np.concatenate(([IGNORE], example.labels[1:])) for example in examples]
    positions = [np.arange(len(example.ids)) for example in examples]
    return {
        "input_ids": _as_row([example.ids for example in examples]),
        "labels": _as_row(labels),
        "position_ids": _as_row(positions),
        "token_keys": _as_row(
            [_key(one) + at for one, at in zip(examples, positions, strict=True)]
        ),
        "example_lengths": [len(example.ids) for example in examples],
        "labelled": torch.from_numpy(np.flatnonzero(np.concatenate(labels) != IGNORE)),
        "example_labelled": [np.count_nonzero(one != IGNORE) for one in labels],
        "names": [example.id for example in examples],
    }


def _key(example: Example) -> int:
    """A number of which others have the next 2^31 only by chance."""
    return zlib.crc32(example.id.encode(errors="surrogatepass")) << 31


def _as_row(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


@torch.no_grad()
def check_isolation(model) -> None:
    """Check that in this model an example in a packed row is computed as if it were alone.

    Several settings (an attention implementation, a cache, a mask) silently turn isolation off.

    Args:
        model: a transformers model, with or without LoRA matrices.

    Raises:
        InputError: what comes first in a row changes what follows, or a layer does not attend as
            the base does.
    """
    attention_check.check(model)
    was_training = model.training
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, other, last = (torch.arange(1, 37, device=model.device) % vocabulary).split(12)
    packing = {"position_ids": torch.arange(12, device=model.device).repeat(2)[None]}
    packing["example_lengths"] = [12, 12]

    def logits(*examples, **kwargs):
        ids = torch.cat(examples)[None]
        return model(input_ids=ids, use_cache=False, **kwargs).logits[0, -12:]

    # With rows of one shape, since kernels for other shapes round differently, and a lot in 16
    # bits.
    packed = logits(first, last, **packing)
    leaked = _largest(packed - logits(other, last, **packing))
    apart = _largest(logits(first, last) - logits(other, last))
    misplaced = _largest(packed - logits(last))
    model.train(was_training)
    if not leaked <= apart / 10:  # so that NaN fails, too
        raise InputError(
            f"packed examples are not kept apart in this model: its logits change by {leaked:.3g} "
            f"with what comes before, and by {apart:.3g} if all of it is attended to"
        )
    if not misplaced <= apart / 2:
        raise InputError(
            "packed examples are not computed as if each were alone in this model: its logits "
            f"change by {misplaced:.3g}, and by {apart:.3g} with what comes before"
        )


def _largest(differences: torch.Tensor) -> float:
    return differences.abs().max().item()
