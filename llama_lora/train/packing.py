"""Rows of tokens: short conversations share a row, and no step is spent on padding."""

import random

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from llama_lora.cli import InputError
from llama_lora.model.template import IGNORE
from llama_lora.train.examples import Example

EPOCH_STRIDE = 1_000_003  # so that neighbouring seeds do not share epochs


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack items into as few rows as best-fit-decreasing finds (Johnson 1973: 11/9 of the optimum).

    Returns:
        For each row the indices of its items. The number of rows depends on the lengths alone, not
        on their order; among items of equal length the earlier goes first.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens → rows
    rooms = 0  # bit n is set where a row has n free tokens
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        with_room.setdefault(room - length, []).append(row)
        rooms |= 1 << (room - length)
    return rows


class Rows(torch.utils.data.Dataset):
    """The rows of an epoch, in the order in which they are trained on.

    Each epoch has its own packing and order, which depend on the seed and the epoch alone, so that
    a resumed run sees what the uninterrupted one would have.
    """

    def __init__(
        self, examples: list[Example], capacity: int, packing: bool, group: int, seed: int
    ):
        """
        Args:
            capacity: tokens of a row.
            packing: whether examples share rows; otherwise each has its own.
            group: without packing, this many neighbours are of about the same length.
        """
        self.examples, self.capacity, self.packing = examples, capacity, packing
        self.group, self.seed = group, seed
        self.lengths = [len(example.ids) for example in examples]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Arrange the rows of an epoch; the Trainer calls this at the start of each."""
        if not self.packing:
            generator = torch.Generator().manual_seed(self.seed + EPOCH_STRIDE * epoch)
            order = get_length_grouped_indices(self.lengths, self.group, generator=generator)
            self.rows = [[i] for i in order]
            return
        shuffle = random.Random(self.seed + EPOCH_STRIDE * epoch).shuffle
        order = list(range(len(self.examples)))
        shuffle(order)
        packed = best_fit_decreasing([self.lengths[i] for i in order], self.capacity)
        shuffle(packed)
        self.rows = [[order[i] for i in row] for row in packed]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.examples[i] for i in self.rows[index]]

    @property
    def fill(self) -> float:
        """Share of the rows' capacity that holds tokens."""
        return sum(self.lengths) / (len(self.rows) * self.capacity)


def collate(rows: list[list[Example]]) -> dict[str, torch.Tensor]:
    """A micro-batch: int64 `input_ids`, `labels` and `position_ids` of [rows, longest row].

    Positions restart with each example, which is how transformers tells the examples of a row apart
    and keeps each from attending to the others. It does so only where no `attention_mask` is given,
    not even one of ones, and none is needed: padding follows all that is learned, so causal
    attention never sees it.
    """
    shape = len(rows), max(sum(len(example.ids) for example in row) for row in rows)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for number, row in enumerate(rows):
        end = sum(len(example.ids) for example in row)
        positions = [np.arange(len(example.ids)) for example in row]
        # Padding goes on counting: it is no example of its own.
        positions.append(np.arange(len(positions[-1]), len(positions[-1]) + shape[1] - end))
        batch["position_ids"][number] = torch.from_numpy(np.concatenate(positions))
        for key, parts in (
            ("input_ids", [example.ids for example in row]),
            ("labels", [example.labels for example in row]),
        ):
            batch[key][number, :end] = torch.from_numpy(np.concatenate(parts))
    return batch


@torch.no_grad()
def check_isolation(model) -> None:
    """Check that in this model an example of a packed row is computed as if it were alone.

    Several settings (an attention implementation, a cache, a mask) turn isolation off in silence.

    Raises:
        InputError: what comes first in a row changes what follows.
    """
    was_training = model.training
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 25, device=model.device)[None] % vocabulary
    positions = torch.arange(12, device=model.device).repeat(2)[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 12:]
    alone = model(input_ids=ids[:, 12:], use_cache=False).logits[0]
    attending = model(input_ids=ids, use_cache=False).logits[0, 12:]
    model.train(was_training)
    leaked, apart = (packed - alone).abs().max().item(), (attending - alone).abs().max().item()
    if not leaked <= apart / 10:  # so that NaN fails, too
        raise InputError(
            f"packed examples are not kept apart in this model: its logits change by {leaked:.3g} "
            f"with what comes before (by {apart:.3g} where all is attended); use --packing False"
        )
