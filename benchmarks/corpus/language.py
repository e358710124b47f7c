"""How often the language of a text is told right, beside polyglot's plain Detector.

python3 -m benchmarks.corpus.language --write
"""

import argparse
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from benchmarks import pages
from benchmarks.pages import ROOT
from benchmarks.training_runs import PACKAGE, package
from llama_lora.corpus.clean.html_to_markdown import is_chatgpt_html, to_markdown
from llama_lora.corpus.language.filter import Filter, language_of
from llama_lora.corpus.language.prose import prose
from llama_lora.corpus.records import formats, reader
from llama_lora.corpus.records.json_values import parse

LENGTHS = 200, 40
LATIN = "en", "es", "fr", "it", "pt", "de", "nl", "gl", "ca", "ro", "af", "da", "sv"
SPACELESS = "zh", "zh-Hant", "ja"
TUNING, HELD_OUT, NEIGHBOURS = "tuning", "held out", "neighbours"

# What chats put around their sentences; the windows take these in turn.
SURROUNDINGS = [
    "{}",
    "https://example.com/docs/getting-started?page=2\n\n{}",
    '{}\n\n```python\nfor line in open("data.txt"):\n    print(line.strip().split(","))\n```',
    "{}\n\n$$\\int_0^1 x^2 \\, dx = \\frac{{1}}{{3}}$$",
    "`pip install numpy` {}",
]

Windows = dict[str, list[str]]


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "language.md")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="folder of downloads")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    logging.disable(logging.WARNING)  # polyglot warns of every text that takes it a second look
    pages.publish(args, "Detecting languages", *sections(args.cache))


def sections(cache: Path) -> Iterator[str]:
    yield (
        "polyglot's detector (CLD2) compares runs of four letters. For a text of over 100 "
        "characters, its reliable answer is taken. For a shorter one it is asked again, with hints "
        "at the languages that chats are mostly in; common words of a language and letters outside "
        "its alphabet count, too (`llama_lora/corpus/language/detector.py`). The characters of "
        "Chinese decide whether it is simplified or traditional. Code, addresses and formulas are "
        "set aside; code without a fence is not, and counts as the Latin text that it is."
    )
    yield (
        "Below, windows of 200 and of 40 characters are cut at word boundaries from the shipped "
        "sample, the Universal Declaration of Human Rights and the openings of classics: all "
        "free to use or in the public domain, and named in `benchmarks/corpus/languages.json`. "
        "Four of five windows have around them what chats put around sentences: an address, fenced "
        "code, a formula, inline code. An answer is right if it names the window's own language. "
        "`Detector` is polyglot's, used as in fschat's `optional_clean.py`, on the same texts."
    )
    yield f"{pages.origin()}."
    yield "## The set that the rules were made with\n\n" + table(TUNING)
    yield "## The set held out while they were made\n\n" + table(HELD_OUT)
    yield (
        "## Neighbours\n\nLanguages that are easily mistaken for one of those above; in a short "
        "text, the evidence for them has to be stronger.\n\n" + table(NEIGHBOURS)
    )
    yield "## Time\n\n" + times(cache)


def table(part: str) -> str:
    """The shares told right, by language, of one part of the set."""
    rows = ["| | windows of 200 | right | Detector | windows of 40 | right | Detector |"]
    rows.append("|---" + "|--:" * 6 + "|")
    sets = {length: windows(part, length) for length in LENGTHS}
    shares = defaultdict(list)
    for language in sets[LENGTHS[0]]:
        cells = [language]
        for length in LENGTHS:
            texts = in_chat(sets[length][language])
            cells.append(str(len(texts)))
            for name, tell in (("ours", told), ("Detector", plainly_told)):
                share = sum(tell(text) == language for text in texts) / len(texts)
                shares[length, name].append(share)
                cells.append(f"{share:.1%}")
        rows.append("| " + " | ".join(cells) + " |")
    means = {key: f"{sum(of) / len(of):.1%}" for key, of in shares.items()}
    cells = [f"| {means[length, 'ours']} | {means[length, 'Detector']}" for length in LENGTHS]
    rows.append("| mean | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def told(text: str) -> str:
    return language_of([{"from": "human", "value": text}])


def plainly_told(text: str) -> str:
    """What the reference script takes for the language of `text`."""
    import pycld2
    from polyglot.detect import Detector
    from polyglot.detect.base import UnknownLanguage

    try:
        return Detector(text).language.code.replace("_", "-")
    except (pycld2.error, UnknownLanguage):
        return "unknown"


def windows(part: str, length: int) -> Windows:
    """The windows of a part of the set, by language."""
    found: Windows = defaultdict(list)
    for language, text in chain(sentences(part), shipped(part)):
        found[language] += cut(text, length, language)
    return found


def sentences(part: str) -> Iterator[tuple[str, str]]:
    for one in the_set()["texts"]:
        if one["part"] == part:
            yield one["language"], " ".join(one["text"])


def shipped(part: str) -> Iterator[tuple[str, str]]:
    """The prose of every other conversation that the project ships."""
    if part == NEIGHBOURS:
        return
    first = 0 if part == TUNING else 1
    of_id = {name: code for code, names in the_set()["sample"].items() for name in names}
    for file, code in ("sharegpt_sample", None), ("dummy_en", "en"), ("dummy_cn", "zh"):
        known = [
            one
            for one in json.loads((ROOT / f"data/{file}.json").read_text(encoding="utf-8"))
            if code or one.get("id") in of_id
        ]
        joined: dict[str, str] = defaultdict(str)
        for one in known[first::2]:
            for turn in one["conversations"]:
                joined[code or of_id[one["id"]]] += readable(turn["value"]) + "\n"
        yield from joined.items()


def readable(text: str) -> str:
    return prose(to_markdown(text) if is_chatgpt_html(text) else text)


def the_set() -> dict:
    return json.loads((ROOT / "benchmarks/corpus/languages.json").read_text(encoding="utf-8"))


def cut(text: str, length: int, language: str) -> list[str]:
    """`text` in windows of at most `length` characters, none much shorter or of other letters."""
    spaceless = language in SPACELESS
    parts = re.sub(r"\s+", "", text) if spaceless else text.split()
    glue = "" if spaceless else " "
    found, window = [], ""
    for part in parts:
        if len(window) + len(glue) + len(part) > length:
            found.append(window)
            window = part
        else:
            window = window + glue + part if window else part
    return [one for one in found if len(one) >= length - 12 and is_in(one, language)]


def is_in(text: str, language: str) -> bool:
    """Whether most of `text` is letters, and of a script that the language has."""
    letters = [one for one in text if one.isalpha() and (language in LATIN or not one.isascii())]
    return len(letters) > len(text) / 2


def in_chat(texts: list[str]) -> list[str]:
    return [SURROUNDINGS[i % len(SURROUNDINGS)].format(text) for i, text in enumerate(texts)]


def times(cache: Path, most: int = 4000) -> str:
    """CPU seconds for the first packaged conversations, the two taking turns at them."""
    records = islice(reader.read(str(package(cache)), salvage=True), most)
    chats = [formats.read(parse(record.raw)[0])[0] for record in records]
    tried = [(cpu(Filter(), chats), cpu(as_the_reference, chats)) for _ in range(5)]
    ours, theirs = map(min, zip(*tried, strict=True))
    return (
        f"CPU seconds for the first {len(chats):,} conversations of "
        f"{PACKAGE.replace('==', ' ')}, best of {len(tried)}: {ours:.2f}, and {theirs:.2f} for "
        f"what fschat's `optional_clean.py` does: {theirs / ours:.1f} times as long."
    )


def as_the_reference(conversation: dict) -> str:
    return plainly_told("\n".join(turn["value"] for turn in conversation["conversations"]))


def cpu(function: Callable, items: list) -> float:
    start = time.process_time()
    for item in items:
        function(item)
    return time.process_time() - start


if __name__ == "__main__":
    main(parse_args())
