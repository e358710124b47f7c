"""Merging: every conversation as it is, in the order and the files that the flags ask for."""

import argparse
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

from llama_lora.cli import InputError
from llama_lora.corpus.duplicates import deduplicate
from llama_lora.corpus.engine.fingerprints import Fingerprint, Fingerprints
from llama_lora.corpus.engine.output import Arrangement, Dropped
from llama_lora.corpus.records.conversation import Conversation, Kept, Rejected, Turn

ALIKE = 0.85  # from this similarity on, two conversations stay on the same side of a held-out split


def build() -> Callable[[Conversation], Kept]:
    """Merging itself changes nothing: conversations are only repaired when they are read."""
    return as_it_is


def as_it_is(conversation: Conversation) -> Kept:
    return Kept([conversation])


@dataclass
class Selection:
    """Shuffles with `seed`, cuts to `limit`, and holds out the share `held_out`.

    Conversations that are equal or similar, or of which one continues the other, stay on one side.
    What is compared is what cleaning will make of them.
    """

    out: str
    seed: int | None = None
    limit: int | None = None
    held_out: float | None = None

    def fingerprinter(self) -> Callable[[list[Turn]], Fingerprint]:
        if self.held_out is None:
            return no_fingerprint
        fingerprint_of = deduplicate.fingerprinter(signed=True)
        return lambda turns: fingerprint_of(as_cleaned(turns))

    def __call__(self, fingerprints: Fingerprints) -> Arrangement:
        order = list(range(len(fingerprints)))
        if self.seed is not None:
            random.Random(self.seed).shuffle(order)
        limit = len(order) if self.limit is None else self.limit
        order, over = order[:limit], order[limit:]
        outputs = {self.out: order}
        if self.held_out is not None:
            group_of = deduplicate.groups(fingerprints, ALIKE)
            chosen = choose(group_of, order, self.held_out, random.Random(self.seed or 0))
            outputs = {
                self.out: [index for index in order if index not in chosen],
                eval_path(self.out): [index for index in order if index in chosen],
            }
        return Arrangement(outputs, dict.fromkeys(over, Dropped("over the limit")))


def arrangement(args: argparse.Namespace) -> Selection | None:
    """How the merged conversations are arranged; None if they stay in the order they came in."""
    if args.shuffle is None and args.limit is None and args.split_eval is None:
        return None
    return Selection(args.out, args.shuffle, args.limit, args.split_eval)


def as_cleaned(turns: list[Turn]) -> list[Turn]:
    """The turns as cleaning makes them; those that it would reject, as they are."""
    from llama_lora.corpus.clean.cleaner import Cleaner  # with libraries that `--help` does without

    try:
        (cleaned,) = Cleaner(blocked=None)({"id": "", "conversations": turns}).conversations
    except Rejected:
        return turns
    return cleaned["conversations"]


def no_fingerprint(turns: list[Turn]) -> Fingerprint:
    """The empty fingerprint of conversations that are not compared."""
    return Fingerprint(b"")


def choose(group_of: list[int], order: list[int], share: float, rng: random.Random) -> set[int]:
    """Indices of about `share` of the conversations, at least one; of each group all or none.

    Raises `InputError` if one side would be empty.
    """
    groups: dict[int, list[int]] = {}
    for index in order:
        groups.setdefault(group_of[index], []).append(index)
    wanted = max(1, round(share * len(order)))
    shuffled = list(groups.values())
    rng.shuffle(shuffled)
    chosen: set[int] = set()
    for group in shuffled:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not 0 < len(chosen) < len(order):
        least = min(map(len, shuffled), default=0)
        raise InputError(
            f"--split-eval {share}: {wanted} of {len(order)} conversations cannot be held out: "
            f"similar ones stay together, at least {least} here, and neither side may be empty"
        )
    return chosen


def eval_path(out: str) -> str:
    """Where the held-out conversations go: to `M.eval.json` beside `M.json`."""
    stem, ending = os.path.splitext(out)
    return f"{stem}.eval{ending}"
