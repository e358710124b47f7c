"""Merging: every conversation as it is, in the order and the files that are asked for."""

import argparse
import os
import random
from collections.abc import Callable
from functools import partial

from llama_lora.corpus.conversation import Conversation, Kept
from llama_lora.corpus.output import Arrangement, Stored


def build() -> Callable[[Conversation], Kept]:
    """Merging changes nothing: all that happens to a conversation happens when it is read."""
    return as_it_is


def as_it_is(conversation: Conversation) -> Kept:
    return Kept([conversation])


def arrangement(args: argparse.Namespace) -> Callable[[list[Stored]], Arrangement] | None:
    """How the merged conversations are arranged; None if they stay in the order they came in."""
    if args.shuffle is None and args.limit is None and args.split_eval is None:
        return None
    return partial(
        arrange, out=args.out, seed=args.shuffle, limit=args.limit, held_out=args.split_eval
    )


def arrange(
    stored: list[Stored],
    out: str,
    seed: int | None = None,
    limit: int | None = None,
    held_out: float | None = None,
) -> Arrangement:
    """Shuffle, cut to `limit`, and hold a share out; equal conversations stay on one side."""
    order = list(range(len(stored)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    order, over = (order, []) if limit is None else (order[:limit], order[limit:])
    outputs = {out: order}
    if held_out is not None:
        chosen = choose(stored, order, held_out, random.Random(seed or 0))
        outputs = {
            out: [index for index in order if index not in chosen],
            eval_path(out): [index for index in order if index in chosen],
        }
    return Arrangement(outputs, dict.fromkeys(over, "over the limit"))


def choose(stored: list[Stored], order: list[int], share: float, rng: random.Random) -> set[int]:
    """Indices of about `share` of the conversations; of equal ones all or none."""
    groups: dict[bytes, list[int]] = {}
    for index in order:
        groups.setdefault(stored[index].digest, []).append(index)
    wanted = round(share * len(order))
    shuffled = list(groups.values())
    rng.shuffle(shuffled)
    chosen: set[int] = set()
    for group in shuffled:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return chosen


def eval_path(out: str) -> str:
    """Where the held-out conversations go: `M.json` has `M.eval.json` beside it."""
    stem, ending = os.path.splitext(out)
    return f"{stem}.eval{ending}"


def fraction(text: str) -> float:
    """A number between 0 and 1, for argparse."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number
