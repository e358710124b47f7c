"""What to ask: the questions of a file, with their categories and languages."""

import random
from dataclasses import dataclass
from pathlib import Path

from llama_lora.corpus.language import UNKNOWN
from llama_lora.corpus.language.filter import language_of
from llama_lora.corpus.records.conversation import Turn
from llama_lora.corpus.records.prompts import read_prompts
from llama_lora.text import sound_text


@dataclass(frozen=True)
class Question:
    """The questions of a conversation; `language` is the one that the answers should be in.

    `before` are the given turns.
    """

    id: str
    category: str
    language: str
    before: list[Turn]
    turns: list[str]


def read(path: Path, limit: int | None, seed: int) -> list[Question]:
    """The questions of a file in order, or `limit` of them at random.

    A record may name its "category", as FastChat's do, and its "language"; otherwise the language
    is detected from the text.

    Raises:
        InputError: a record is not a question.
    """
    asked = read_prompts(str(path))
    if limit and limit < len(asked):
        asked = [asked[i] for i in sorted(random.Random(seed).sample(range(len(asked)), limit))]
    found = []
    for one in asked:
        category = str(one.about.get("category") or "general")
        turns = [{"from": "human", "value": text} for text in one.questions]
        language = str(one.about.get("language") or language_of(turns))
        about = one.id, sound_text(category), sound_text(language)
        found.append(Question(*about, one.before, one.questions))
    return found


def same_language(wanted: str, found: str) -> bool | None:
    """Whether an answer is in the language that was `wanted`; None if either cannot be told."""
    if UNKNOWN in (wanted, found):
        return None
    return wanted.partition("-")[0] == found.partition("-")[0]
