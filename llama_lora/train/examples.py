"""From a corpus file to token ids and labels."""

import random
from dataclasses import dataclass

import numpy as np

from llama_lora.cli import InputError
from llama_lora.corpus import conversation, files
from llama_lora.model.template import IGNORE, Template

BATCH = 256  # conversations tokenized in one call


@dataclass(frozen=True)
class Example:
    """One conversation as the model reads it: int32 ids and labels of the same length.

    `source` is the conversation that it is a piece of, or its own id.
    """

    id: str
    source: str
    ids: np.ndarray
    labels: np.ndarray


@dataclass
class Audit:
    """What became of a corpus file."""

    conversations: int = 0
    tokens: int = 0
    labelled: int = 0
    truncated: int = 0
    unlabelled: int = 0

    def __str__(self) -> str:
        share = self.labelled / max(self.tokens, 1)
        return (
            f"{self.conversations:,} conversations · {self.tokens:,} tokens · "
            f"{self.labelled:,} labelled ({share:.1%}) · {self.truncated:,} truncated · "
            f"{self.unlabelled:,} left out: no answer within the length"
        )


def load_examples(path: str, template: Template, max_length: int) -> tuple[list[Example], Audit]:
    """Tokenize a corpus file.

    Args:
        max_length: in tokens; what is beyond is cut off, and counted.

    Raises:
        InputError: not a corpus file, or no labelled token in it.
    """
    audit, examples = Audit(), []
    for batch in _batches(_conversations(path)):
        for item, encoded in zip(batch, template.encode_batch(batch), strict=True):
            ids, labels = encoded.ids, encoded.labels
            audit.truncated += len(ids) > max_length
            kept = Example(
                item["id"],
                item.get("piece_of", item["id"]),
                np.array(ids[:max_length], np.int32),
                np.array(labels[:max_length], np.int32),
            )
            labelled = int((kept.labels != IGNORE).sum())
            if not labelled:
                audit.unlabelled += 1
                continue
            audit.conversations += 1
            audit.tokens += len(kept.ids)
            audit.labelled += labelled
            examples.append(kept)
    if not examples:
        raise InputError(
            f"{path}: no token to learn: expected answers within {max_length} tokens, found none "
            f"in {audit.unlabelled} conversations"
        )
    return examples, audit


def hold_out(examples: list[Example], ratio: float, seed: int) -> tuple[list, list]:
    """Split into examples to train on and those of at least one conversation to measure on.

    Pieces of one conversation repeat some of each other, so they stay on one side.
    """
    sources = list(dict.fromkeys(example.source for example in examples))
    count = max(1, round(len(sources) * ratio))
    if count >= len(sources):
        raise InputError(f"--eval_ratio {ratio}: no conversation is left to train on")
    held = set(random.Random(seed).sample(sources, count))
    return (
        [example for example in examples if example.source not in held],
        [example for example in examples if example.source in held],
    )


def _conversations(path: str):
    for record in files.read(path):
        try:
            item, repairs = conversation.check(files.parse(record.raw)[0])
            turns = conversation.put_in_order(item["conversations"], repairs)
            yield {**item, "conversations": turns, **conversation.marks_of(item, turns)}
        except (conversation.Rejected, ValueError) as error:
            reason = " ".join(str(part) for part in error.args)
            raise InputError(
                f"{path}: conversation {record.index} (byte {record.offset}): {reason}; "
                "clean the file with fastchat/data/clean_sharegpt.py first"
            ) from error


def _batches(items):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
