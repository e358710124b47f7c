"""The language filter: polyglot's detector on the prose of a conversation."""

import argparse
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from llama_lora.corpus.account import Account
from llama_lora.corpus.conversation import Conversation, Kept, Rejected, Turn
from llama_lora.corpus.prose import prose

UNKNOWN = "unknown"  # too short or too mixed to tell
ALIASES = {
    "he": "iw",
    "jv": "jw",
    "zh-tw": "zh-Hant",
    "zh-hk": "zh-Hant",
    "zh-cn": "zh",
    "zh-hans": "zh",
}
NOT_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
KANA = re.compile("[\u3040-\u30ff\uff66-\uff9f]")
REJECTED = "language "
REPEATED_DIGIT = re.compile(r"(\d)\1{8}")


@dataclass
class Filter:
    """Keeps the conversations in the languages of `keep` (all if empty) and not of `skip`.

    `zh` is simplified and traditional Chinese, `zh-Hant` the latter alone. What cannot be told is
    kept. With `reduce_rep` nine equal digits in a row are a reason to reject.
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
        """Whether a conversation in `language` stays."""
        names = {language, language.partition("-")[0]}
        return names.isdisjoint(self.skip) and not (self.keep and names.isdisjoint(self.keep))


def told(account: Account) -> Counter:
    """How many conversations in each language were read."""
    rejected = {
        reason.removeprefix(REJECTED): count
        for reason, count in account.rejected.items()
        if reason.startswith(REJECTED)
    }
    return account.seen + Counter(rejected)


def language_of(turns: list[Turn]) -> str:
    """The language in which most of the prose of the turns is written.

    Each turn votes with its length; where none can be told by itself, all are read as one.
    """
    texts = [prose(turn["value"]) for turn in turns]
    votes: Counter = Counter()
    for text in texts:
        votes[detected(text)] += len(text)
    del votes[UNKNOWN]
    return votes.most_common(1)[0][0] if votes else detected("\n".join(texts))


def detected(text: str) -> str:
    """The code of the language of `text`, as the detector names it, or `UNKNOWN`."""
    detector, failures = polyglot()
    try:
        code = detector(NOT_TEXT.sub(" ", text)).language.code
    except failures:
        return UNKNOWN
    if code == "ja" and not KANA.search(text):
        code = chinese(text)  # no Japanese is written without kana
    return UNKNOWN if code == "un" else code.replace("_", "-")


def chinese(text: str) -> str:
    """`zh`, or `zh-Hant` if more of `text` is in the traditional character set."""
    in_set = {name: len(text.encode(name, "ignore")) for name in ("gb2312", "big5")}
    return "zh-Hant" if in_set["big5"] > in_set["gb2312"] else "zh"


@cache
def polyglot() -> tuple[type, tuple[type, ...]]:
    """The detector, and what it raises where it cannot tell."""
    from polyglot.detect import base
    from pycld2 import error

    base.logger.setLevel(logging.ERROR)  # it warns of every text that took it a second look
    return base.Detector, (base.UnknownLanguage, error)


@cache
def known_codes() -> list[str]:
    """The codes of all languages that the detector can tell."""
    from icu import Locale
    from pycld2 import LANGUAGES

    codes = {Locale(code).getName() for name, code in LANGUAGES if not name.startswith("X_")}
    return sorted(code.replace("_", "-") for code in codes - {"un", "xxx", ""})


def code(text: str) -> str:
    """A code as the detector names it, for argparse."""
    wanted = ALIASES.get(text.lower().replace("_", "-"), text)
    for known in known_codes():
        if known.lower() == wanted.lower().replace("_", "-"):
            return known
    raise argparse.ArgumentTypeError(
        f"{text!r} is no language the detector knows: {' '.join(known_codes())}"
    )
