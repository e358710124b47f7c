"""Examples as long, and as much of them answer, as real conversations: see `count_lengths.py`."""

import json
from pathlib import Path

import numpy as np

from llama_lora.model.labels import IGNORE
from llama_lora.train.data.example import Example

FILE = Path(__file__).with_name("lengths.json")
WHOLE = "conversations"  # the entry of those that were not split
SPECIAL = 3  # ids below are unk, bos and eos


class Pieces(list):
    """Examples of random tokens, as long and as labelled as real pieces of conversations."""

    @property
    def lengths(self) -> list[int]:
        return [len(piece.ids) for piece in self]

    @property
    def labelled(self) -> int:
        """Tokens to learn."""
        return sum(int((piece.labels != IGNORE).sum()) for piece in self)


def pieces(window: int, scale: int, words: int) -> Pieces:
    """The pieces of a window, `scale` times shorter, of a vocabulary of `words`."""
    draw = np.random.default_rng(0)
    pairs = json.loads(FILE.read_text())[str(window)]
    return Pieces(piece(max(2, a // scale), max(1, b // scale), words, draw) for a, b in pairs)


def piece(tokens: int, labelled: int, words: int, draw: np.random.Generator):
    """An `Example` whose last tokens are its answer."""
    ids = draw.integers(SPECIAL, words, tokens, dtype=np.int32)
    labels = ids.copy()
    labels[: tokens - labelled] = IGNORE
    return Example("", "", ids, labels)


def labelled_share() -> float:
    """Of the tokens of whole conversations."""
    pairs = np.array(json.loads(FILE.read_text())[WHOLE])
    return float(pairs[:, 1].sum() / pairs[:, 0].sum())


def within(tokens: int) -> float:
    """Share of whole conversations that are no longer than that."""
    pairs = np.array(json.loads(FILE.read_text())[WHOLE])
    return float((pairs[:, 0] <= tokens).mean())
