"""The losses of a held-out corpus, conversation by conversation."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llama_lora.chat.adapters import BASE, Adapters
from llama_lora.eval.bootstrap import Estimate, ratios
from llama_lora.eval.token_losses import labelled_counts, summed_losses, token_changes
from llama_lora.train.data.example import Example
from llama_lora.train.data.examples import Audit, Examples, hold_out, load_examples

ADAPTER = "adapter"  # the name of the side that is compared with `BASE`
EXTREMES = 3  # conversations to look at, of those that changed most for better and for worse
LOOKED_AT = 512  # tokens of each


@dataclass(frozen=True)
class Conversation:
    """The loss per labelled token (nats) over all pieces of a conversation, by side.

    `piece` is the index of the piece on which the sides differ most.
    """

    id: str
    labelled: int
    losses: dict[str, float]
    piece: int

    @property
    def change(self) -> float:
        """What the adapter adds to the loss per labelled token; below 0 is better."""
        return self.losses[ADAPTER] - self.losses[BASE]


@dataclass(frozen=True)
class Look:
    """The first `LOOKED_AT` tokens of a piece, and what the adapter adds to the loss of each.

    `left` is the number of tokens after them.
    """

    conversation: Conversation
    left: int
    example: Example
    changes: np.ndarray


@dataclass(frozen=True)
class HeldOut:
    """A held-out corpus as measured: the loss per labelled token of each side, and its change.

    `looks` are at the conversations that changed most, first those that got better.
    """

    path: str
    max_length: int
    audit: Audit
    conversations: list[Conversation]
    losses: dict[str, Estimate]
    change: Estimate | None
    looks: list[Look]

    @property
    def labelled(self) -> int:
        return sum(one.labelled for one in self.conversations)

    @property
    def better(self) -> list[Conversation]:
        return [one for one in self.conversations if one.change < 0]

    @property
    def worse(self) -> list[Conversation]:
        return [one for one in self.conversations if one.change > 0]

    def as_json(self) -> dict:
        """The figures, without the texts."""
        found = {
            "data_path": self.path,
            "max_length": self.max_length,
            "file": vars(self.audit),
            "labelled_tokens": self.labelled,
            "loss": {side: vars(loss) for side, loss in self.losses.items()},
            "perplexity": {side: vars(perplexity(loss)) for side, loss in self.losses.items()},
        }
        if self.change:
            counts = len(self.better), len(self.worse)
            found |= {"change": vars(self.change), "better": counts[0], "worse": counts[1]}
        found["conversations"] = [
            {"id": one.id, "labelled_tokens": one.labelled, "loss": one.losses}
            for one in self.conversations
        ]
        return found


def perplexity(loss: Estimate) -> Estimate:
    """e to the loss, and e to its limits."""
    return Estimate(*(None if value is None else math.exp(value) for value in vars(loss).values()))


def load(args, template) -> tuple[Examples, Audit]:
    """The examples to measure on, and the audit of the file.

    It uses, of `args`, `data_path`, `max_length` in tokens, `eval_ratio` (the share that
    train_lora.py held out with the same `seed`; None: all), and `limit` (the most conversations;
    None: all).
    """
    path, length = str(args.data_path), args.max_length
    examples, audit = load_examples(path, template, length, allow_truncation=True)
    if args.eval_ratio:
        _, examples = hold_out(examples, args.eval_ratio, args.seed)
    if args.limit:
        examples = drawn(examples, args.limit, args.seed)
    return examples, audit


def drawn(examples: Examples, limit: int, seed: int) -> Examples:
    """At most `limit` conversations with all their pieces, at random."""
    sources = list(dict.fromkeys(examples.sources))
    chosen = set(random.Random(seed).sample(sources, min(limit, len(sources))))
    return examples.select([i for i, source in enumerate(examples.sources) if source in chosen])


def measure(
    adapters: Adapters, sides: list[str], examples: Examples, audit: Audit, args, kept
) -> HeldOut:
    """The losses of all sides on what `load` has read; `kept` as in `summed_losses`."""
    sums = summed_losses(adapters, sides, examples, args.max_length, kept)
    counts = labelled_counts(examples)
    conversations = list(by_conversation(examples, sums, counts))
    weights = np.array([one.labelled for one in conversations], float)
    columns = [[one.losses[side] for one in conversations] for side in sums]
    if ADAPTER in sums:
        columns.append([one.change for one in conversations])
    estimates = ratios(np.array(columns).T * weights[:, None], weights, args.seed)
    losses = dict(zip(sums, estimates, strict=False))
    change = estimates[-1] if ADAPTER in sums else None
    looks = look(adapters, examples, extremes(conversations)) if ADAPTER in sums else []
    path, length = str(args.data_path), args.max_length
    return HeldOut(path, length, audit, conversations, losses, change, looks)


def extremes(conversations: list[Conversation]) -> list[Conversation]:
    """Those that improved most, then those that got worse most."""
    ordered = sorted(conversations, key=lambda one: one.change)
    better = [one for one in ordered[:EXTREMES] if one.change < 0]
    return better + [one for one in ordered[: -EXTREMES - 1 : -1] if one.change > 0]


def look(adapters: Adapters, examples: Examples, chosen: list[Conversation]) -> list[Look]:
    """The chosen conversations, token by token."""
    wholes = [examples[one.piece] for one in chosen]
    left = [max(0, len(whole.ids) - LOOKED_AT) for whole in wholes]
    pieces = [
        replace(whole, ids=whole.ids[:LOOKED_AT], labels=whole.labels[:LOOKED_AT])
        for whole in wholes
    ]
    changes = token_changes(adapters, BASE, ADAPTER, pieces)
    return [Look(*parts) for parts in zip(chosen, left, pieces, changes, strict=True)]


def by_conversation(
    examples: Examples, sums: dict[str, np.ndarray], counts: np.ndarray
) -> Iterator[Conversation]:
    """The conversations that `examples` are pieces of, in the order of the file."""
    pieces: dict[str, list[int]] = {}
    for index, source in enumerate(examples.sources):
        pieces.setdefault(source, []).append(index)
    changes = np.abs(sums[ADAPTER] - sums[BASE]) if ADAPTER in sums else counts
    for source, members in pieces.items():
        labelled = int(counts[members].sum())
        losses = {side: float(values[members].sum() / labelled) for side, values in sums.items()}
        yield Conversation(source, labelled, losses, max(members, key=lambda i: changes[i]))
