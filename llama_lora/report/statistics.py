"""The statistics of a corpus file: what is in it, how long it is, and what training makes of it."""

import argparse
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from llama_lora.corpus.duplicates.deduplicate import digests_of, exact_duplicates
from llama_lora.corpus.engine import stage
from llama_lora.corpus.engine.account import accumulate
from llama_lora.corpus.engine.fingerprints import Fingerprint, Fingerprints
from llama_lora.corpus.language.filter import language_of
from llama_lora.corpus.records.conversation import (
    GPT,
    HUMAN,
    Conversation,
    Rejected,
    count_pairs,
    piece_keys_of,
    put_in_order,
)
from llama_lora.corpus.records.ids import id_hash
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.train.data.bin_packing import best_fit_decreasing
from llama_lora.train.data.examples import Audit


def lengths() -> array:
    """An empty array of lengths: 4 bytes each, so that a million take little memory."""
    return array("I")


def id_hashes() -> array:
    """An empty array of values of `id_hash`."""
    return array("Q")


@dataclass
class Statistics:
    """What was found in a corpus file.

    Lengths are in arrays, in the order of the file: `turns` and `tokens` by conversation,
    `questions` and `answers` in characters by turn. `tokens` counts what the template renders,
    `trained` how much of it training reads, for the conversations that `audit` counts, and
    `labelled` how much of that it learns.
    """

    read: int = 0
    pairs: int = 0
    formats: Counter = field(default_factory=Counter)
    repairs: Counter = field(default_factory=Counter)
    roles: Counter = field(default_factory=Counter)
    languages: Counter = field(default_factory=Counter)
    unreadable: Counter = field(default_factory=Counter)
    untrainable: Counter = field(default_factory=Counter)
    duplicates: Counter = field(default_factory=Counter)
    audit: Audit = field(default_factory=Audit)
    unreadable_at: array = field(default_factory=lengths)
    turns: array = field(default_factory=lengths)
    questions: array = field(default_factory=lengths)
    answers: array = field(default_factory=lengths)
    tokens: array = field(default_factory=lengths)
    trained: array = field(default_factory=lengths)
    labelled: array = field(default_factory=lengths)
    ids: array = field(default_factory=id_hashes)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    damages: list[str] = field(default_factory=list)

    @property
    def conversations(self) -> int:
        """How many records are conversations."""
        return self.read - self.unreadable.total()

    def add(self, other: "Statistics") -> None:
        """Add what was found in the records that follow."""
        accumulate(self, other)

    def describe(self, one: stage.Reading) -> None:
        """Record what can be seen in a conversation without a tokenizer."""
        conversation = one.conversation
        turns = conversation["conversations"]
        pairs = count_pairs(turns)
        self.formats[one.format] += 1
        self.repairs.update(one.repairs)
        self.pairs += pairs
        self.roles.update(turn["from"] for turn in turns)
        self.languages[language_of(turns)] += 1
        self.turns.append(len(turns))
        self.questions.extend(len(turn["value"]) for turn in turns if turn["from"] == HUMAN)
        self.answers.extend(len(turn["value"]) for turn in turns if turn["from"] == GPT)
        self.ids.append(id_hash(conversation["id"]))
        self.fingerprints.add(Fingerprint(digests_of(turns)))

    def measure(self, labels: list[int], max_length: int) -> None:
        """Record what training reads and learns of a conversation, as its loader does."""
        labels = np.asarray(labels)
        self.tokens.append(len(labels))
        if self.audit.add(labels, max_length):
            self.trained.append(min(len(labels), max_length))
            self.labelled.append(int(np.count_nonzero(labels[:max_length] != IGNORE)))

    def count_duplicates(self) -> None:
        """Count the conversations that cleaning would drop as duplicates, and the ids used twice.

        The fingerprints are then dropped: they are most of the memory of the statistics.
        """
        self.duplicates.update(gone.reason for gone in exact_duplicates(self.fingerprints).values())
        self.duplicates["equal ids"] = len(self.ids) - len(set(self.ids))
        self.fingerprints, self.ids = Fingerprints(), id_hashes()

    def packs(self, max_length: int) -> int:
        """Rows of `max_length` tokens in an epoch."""
        return len(best_fit_decreasing(self.trained.tolist(), max_length))


class StatisticsCounter:
    """Counts chunks of records, in a worker process.

    `model` is the folder of a tokenizer; None for statistics without tokens.
    """

    def __init__(self, model: str | None, template: str, max_length: int):
        self.renderer = renderer(model, template)
        self.max_length = max_length

    def __call__(self, chunk: list, at: Callable[[int], None]) -> Statistics:
        statistics, trainable = Statistics(read=len(chunk)), []
        for number, (_, record) in enumerate(chunk):
            at(number)
            one = stage.reading(record)
            if one.rejected:
                statistics.unreadable[one.rejected.reason] += 1
                statistics.unreadable_at.append(record.index)
                continue
            statistics.describe(one)
            try:
                trainable.append(as_trained(one.conversation))
            except Rejected as rejected:
                statistics.untrainable[rejected.reason] += 1
        if self.renderer and trainable:
            for item, encoded in zip(trainable, self.renderer.encode_batch(trainable), strict=True):
                statistics.audit.special += self.renderer.spells_special(item["conversations"])
                statistics.measure(encoded.labels, self.max_length)
        return statistics


def renderer(model: str | None, template: str) -> Template | None:
    """The template with the tokenizer in the folder `model`; None without one."""
    return Template(load_tokenizer(model), template) if model else None


def as_trained(conversation: Conversation) -> Conversation:
    """The turns that training reads. Raises `Rejected` if it would refuse the file."""
    turns = put_in_order(conversation["conversations"], Counter())
    return {**conversation, "conversations": turns, **piece_keys_of(conversation, turns)}


def take(args: argparse.Namespace) -> Statistics:
    """The statistics of the file `args.inputs`."""
    statistics, damages = Statistics(), []
    build = partial(StatisticsCounter, args.model, args.template, args.max_length)
    with ExitStack() as stack:
        records = stage.tracked([args.inputs], args, damages, stack)
        chunks = stage.chunked(records, stage.CHUNK_BYTES)
        for found in stack.enter_context(closing(stage.mapped(chunks, build, args.workers))):
            statistics.add(found)
    statistics.damages = damages
    stage.tell(damages)
    statistics.count_duplicates()
    return statistics
