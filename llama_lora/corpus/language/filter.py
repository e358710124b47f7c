"""The language filter: keeps or skips conversations by the language of most of their prose."""

import argparse
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from llama_lora.corpus.engine.account import Account
from llama_lora.corpus.language import UNKNOWN
from llama_lora.corpus.language.prose import prose
from llama_lora.corpus.records.conversation import Conversation, Kept, Rejected, Turn

ALIASES = {
    "he": "iw",
    "jv": "jw",
    "zh-tw": "zh-Hant",
    "zh-hk": "zh-Hant",
}
SIMPLIFIED = "zh-cn", "zh-sg", "zh-hans"  # codes that the detector does not have
REJECTED = "language "
EXCERPT = 170  # characters of a turn's prose looked at in each of three places
REPEATED_DIGIT = re.compile(r"(\d)\1{8}")


@dataclass
class Filter:
    """Keeps conversations whose language is in `keep` (any if empty) and not in `skip`.

    `zh` is simplified and traditional Chinese, `zh-Hant` only traditional. Conversations whose
    language cannot be told are kept. With `reduce_rep`, nine equal digits in a row are rejected.
    """

    keep: list[str] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)
    reduce_rep: bool = False

    def __call__(self, conversation: Conversation) -> Kept:
        turns = conversation["conversations"]
        if self.reduce_rep and any(REPEATED_DIGIT.search(turn["value"]) for turn in turns):
            raise Rejected("repeated digits")
        language = language_of(turns)
        if language != UNKNOWN and not self.wants(language):
            raise Rejected(REJECTED + language)
        return Kept([conversation], seen=Counter([language]))

    def wants(self, language: str) -> bool:
        """Whether a conversation in `language` is kept."""
        names = {language, language.partition("-")[0]}
        return names.isdisjoint(self.skip) and not (self.keep and names.isdisjoint(self.keep))


def languages_read(account: Account) -> Counter:
    """How many conversations in each language were read."""
    rejected = {
        reason.removeprefix(REJECTED): count
        for reason, count in account.rejected.items()
        if reason.startswith(REJECTED)
    }
    return account.seen + Counter(rejected)


def language_of(turns: list[Turn]) -> str:
    """The language of most of the turns' prose.

    Each turn votes with its size. If the language of none can be told by itself, all are read as
    one.
    """
    votes: Counter = Counter()
    values = sorted((turn["value"] for turn in turns), key=len, reverse=True)
    left = sum(map(size, values))
    for value in values:
        text = prose(value)
        votes[detect(excerpts(text))] += size(text)
        left -= size(value)
        if is_decided(votes, left):
            break
    del votes[UNKNOWN]
    if not votes:
        return detect(excerpts("\n".join(map(prose, values))))
    return votes.most_common(1)[0][0]


def detect(text: str) -> str:
    """The code of the language of `text`, or `UNKNOWN`."""
    from llama_lora.corpus.language import (
        detector,  # imports polyglot, which `--help` does not need
    )

    return detector.detect(text)


def size(text: str) -> int:
    """The bytes of `text`: a Chinese character says as much as three letters, and takes three."""
    return len(text.encode())


def excerpts(text: str) -> str:
    """The beginning, middle and end of `text`: a task and its subject may be in two languages."""
    if len(text) <= 3 * EXCERPT:
        return text
    middle = len(text) // 2
    return f"{text[:EXCERPT]}\n{text[middle : middle + EXCERPT]}\n{text[-EXCERPT:]}"


def is_decided(votes: Counter, left: int) -> bool:
    """Whether `left` more votes cannot change which language has the most."""
    first, second = sorted((*(votes[name] for name in votes if name != UNKNOWN), 0, 0))[:-3:-1]
    return first > second + left


@cache
def known_codes() -> list[str]:
    """The codes of all languages that the detector knows."""
    from icu import Locale
    from pycld2 import LANGUAGES

    codes = {Locale(code).getName() for name, code in LANGUAGES if not name.startswith("X_")}
    return sorted(code.replace("_", "-") for code in codes - {"un", "xxx", ""})


def language_code(text: str) -> str:
    """A code as the detector names it, for argparse."""
    name = text.lower().replace("_", "-")
    if name in SIMPLIFIED:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be named alone: zh is all Chinese, zh-Hant only traditional; for "
            "simplified Chinese, keep zh and skip zh-Hant"
        )
    wanted = ALIASES.get(name, name)
    for known in known_codes():
        if known.lower() == wanted.lower():
            return known
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a language the detector knows: {' '.join(known_codes())}"
    )
