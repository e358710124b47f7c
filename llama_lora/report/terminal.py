"""The report for the terminal, and a conversation with what is learned in colour."""

import os
import re
import sys
from collections.abc import Sequence

import numpy as np

from llama_lora.corpus.engine.account import listed
from llama_lora.report.conversation_view import BEYOND, FRAME, PLAIN, TRAINED, ConversationView
from llama_lora.report.statistics import Statistics

COLOURS = {PLAIN: "", TRAINED: "\33[32m", FRAME: "\33[2m", BEYOND: "\33[9;31m"}
BOLD, OFF = "\33[1m", "\33[0m"
SIGNS = {PLAIN: ("", ""), TRAINED: ("⟦", "⟧"), FRAME: ("", ""), BEYOND: ("⟪", "⟫")}
MEANINGS = {TRAINED: "learned", FRAME: "added by the template", BEYOND: "cut off by the window"}

SHARES = {"least": 0, "5%": 5, "25%": 25, "half": 50, "75%": 75, "95%": 95, "99%": 99, "most": 100}
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def summary(statistics: Statistics, max_length: int) -> str:
    """What was found, in lines."""
    facts = {
        "conversations": f"{statistics.conversations:,} with {statistics.pairs:,} pairs",
        "formats": listed(statistics.formats),
        "roles": listed(statistics.roles),
        "languages": listed(statistics.languages),
        "duplicates": listed(statistics.duplicates) or "none",
        "unreadable": listed(statistics.unreadable),
        "not trainable": listed(statistics.untrainable),
        "repaired as read": listed(statistics.repairs),
    }
    rows = [f"{name:<18}{value}" for name, value in facts.items() if value]
    if statistics.turns:
        rows += ["", *table(statistics)]
    if statistics.tokens:
        rows += ["", training(statistics, max_length)]
    return "\n".join(rows)


def measures(statistics: Statistics) -> dict[str, Sequence[int]]:
    """The lengths that were measured, by what they measure; empty ones are left out."""
    taken = {
        "turns": statistics.turns,
        "characters, question": statistics.questions,
        "characters, answer": statistics.answers,
        "tokens": statistics.tokens,
        "labelled tokens": statistics.labelled,
    }
    return {name: values for name, values in taken.items() if values}


def percentiles(values: Sequence[int]) -> list[int]:
    """The percentiles at `SHARES`, and the mean, in whole numbers."""
    numbers = np.asarray(values)
    found = np.percentile(numbers, list(SHARES.values()), method="inverted_cdf")
    return [*map(int, found), round(float(numbers.mean()))]


def table(statistics: Statistics) -> list[str]:
    """The percentiles of all measures, in aligned lines."""
    rows = [["", *SHARES, "mean"]]
    for name, values in measures(statistics).items():
        rows.append([name, *(f"{value:,}" for value in percentiles(values))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def training(statistics: Statistics, max_length: int) -> str:
    """What an epoch is, in the words of the trainer."""
    packs = statistics.packs(max_length)
    room = max(packs * max_length, 1)
    return (
        f"at {max_length:,} tokens: {statistics.audit}\n"
        f"an epoch: {packs:,} packs, {statistics.audit.tokens / room:.1%} full"
    )


def in_colour() -> bool:
    """Whether stdout is a terminal, and NO_COLOR is not set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def shown(view: ConversationView, colour: bool) -> str:
    """The conversation with what is learned marked, by colours or by signs."""
    facts = [f"conversation {view.index}", visible(view.id), view.language]
    if view.tokens is not None:
        facts.append(f"{view.tokens:,} tokens, {view.labelled:,} learned")
    lines = [strong(" · ".join(facts), colour), *view.notes]
    kinds = {segment.kind for block in view.blocks for segment in block.segments}
    marks = [kind for kind in MEANINGS if kind in kinds and (colour or any(SIGNS[kind]))]
    if marks:
        lines.append("marked: " + ", ".join(mark(kind, MEANINGS[kind], colour) for kind in marks))
    for block in view.blocks:
        parts = (mark(one.kind, visible(one.text), colour) for one in block.segments)
        lines += ["", strong(block.role or "rendered", colour), "".join(parts)]
    return "\n".join(lines)


def strong(text: str, colour: bool) -> str:
    return BOLD + text + OFF if colour else text


def mark(kind: str, text: str, colour: bool) -> str:
    """`text` with the colour, or between the signs, of its kind."""
    if colour:
        return COLOURS[kind] + text + OFF if COLOURS[kind] else text
    before, after = SIGNS[kind]
    return before + text + after


def visible(text: str) -> str:
    """`text` with control characters, above all escapes, shown instead of sent to the terminal."""
    return CONTROL.sub(lambda found: escape(ord(found[0])), text)


def escape(code: int) -> str:
    """How a character is written in a string literal."""
    return f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"
