"""The report as one HTML page that needs no network, with charts and a search.

The page's policy allows the one script and the one style in it, by their hashes, and nothing else.
All text of the corpus is escaped, or is JSON that only ever becomes text nodes.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np

from llama_lora.corpus.engine import stage
from llama_lora.corpus.records.atomic_files import replacing
from llama_lora.corpus.records.json_values import dump
from llama_lora.report import charts, provenance
from llama_lora.report.conversation_view import KINDS, ConversationView, choose, sample
from llama_lora.report.html_frame import environment, part, policy
from llama_lora.report.statistics import Statistics
from llama_lora.report.terminal import SHARES, measures, percentiles

MOST_LANGUAGES = 12


@dataclass(frozen=True)
class Chart:
    """A drawing, its title, and its caption."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Bar:
    """A count among others; `share` is in percent of the largest."""

    name: str
    count: int
    share: float


def opened(args: argparse.Namespace, stack: ExitStack) -> Callable[[Statistics], None]:
    """A function that writes the page to `args.html`, with at most `args.sample` conversations.

    Problems with that file, and with the accounts of the stages before, are found now and not after
    the statistics.
    """
    stage.spare([args.inputs], "--html", args.html)
    file = stack.enter_context(replacing(args.html))
    return partial(write, file, args, provenance.steps(args.inputs))


def write(
    file: BinaryIO,
    args: argparse.Namespace,
    steps: list[provenance.StageRun],
    statistics: Statistics,
) -> None:
    """Write the page."""
    chosen = choose(args.begin, statistics.read, statistics.unreadable_at, args.sample)
    style, script = part("report/page.css"), part("report/page.js")
    packs = statistics.packs(args.max_length) if statistics.tokens else 0
    made = environment()
    made.filters["bars"] = bars
    pieces = made.get_template("report/page.html").generate(
        name=os.path.basename(args.inputs),
        policy=policy(style, script),
        style=style,
        script=script,
        args=args,
        statistics=statistics,
        figures=figures(statistics, packs),
        packs=packs,
        fill=statistics.audit.tokens / max(packs * args.max_length, 1),
        steps=steps,
        charts=list(drawn(statistics, args.max_length)),
        languages=bars(statistics.languages, MOST_LANGUAGES),
        shares=[*SHARES, "mean"],
        percentiles={name: percentiles(values) for name, values in measures(statistics).items()},
        kinds=KINDS,
        shown=len(chosen),
        views=map(embedded, sample(args, chosen)),
    )
    for piece in pieces:
        file.write(piece.encode())


def figures(statistics: Statistics, packs: int) -> list[tuple[str, str]]:
    """The figures to see first, each with its label."""
    shown = [(f"{statistics.conversations:,}", "conversations"), (f"{statistics.pairs:,}", "pairs")]
    if audit := statistics.tokens and statistics.audit:
        shown += [
            (f"{audit.tokens:,}", "tokens in an epoch"),
            (f"{audit.labelled / max(audit.tokens, 1):.1%}", "of them learned"),
            (f"{packs:,}", "packs in an epoch"),
        ]
    equal = statistics.duplicates.total() - statistics.duplicates["equal ids"]
    return [*shown, (f"{equal:,}", "duplicates")]


def drawn(statistics: Statistics, window: int) -> Iterator[Chart]:
    """The histograms that have anything to show."""
    share = 100 * np.asarray(statistics.labelled) // np.maximum(np.asarray(statistics.trained), 1)
    of = "conversations"
    for title, values, unit, counted, mark in (
        ("Length of a conversation", statistics.tokens, "tokens", of, window),
        ("Share that is learned", share, "% of its tokens", of, None),
        ("Turns in a conversation", statistics.turns, "turns", of, None),
        ("Length of a question", statistics.questions, "characters", "questions", None),
        ("Length of an answer", statistics.answers, "characters", "answers", None),
    ):
        sign = "%" * unit.startswith("%")
        if len(values):
            low, half, high = (f"{percentiles(values)[i]:,}{sign}" for i in (1, 3, 5))
            caption = f"half at most {half}; nine in ten {low} to {high}"
            svg = charts.svg(title, unit, charts.histogram(values), counted, mark)
            yield Chart(title, caption, svg)


def bars(counts: Counter | list[tuple[str, int]], most: int = 100) -> list[Bar]:
    """The largest `most` counts, and the rest as one."""
    ordered = counts.most_common() if isinstance(counts, Counter) else counts
    largest = max((count for _, count in ordered), default=1)
    rest = sum(count for _, count in ordered[most:])
    ordered = ordered[:most] + ([(f"{len(ordered) - most} others", rest)] if rest else [])
    return [Bar(name, count, round(100 * count / largest, 2)) for name, count in ordered]


def embedded(view: ConversationView) -> str:
    """A conversation as JSON that can be put in a script element: no `<` ends it.

    A segment is the index of its kind in `KINDS`, followed by its text.
    """
    blocks = [
        [block.role, [x for one in block.segments for x in (KINDS.index(one.kind), one.text)]]
        for block in view.blocks
    ]
    item = {
        "id": view.id,
        "index": view.index,
        "language": view.language,
        "tokens": view.tokens,
        "learned": view.labelled,
        "notes": view.notes,
        "blocks": blocks,
    }
    return dump(item).decode().replace("<", "\\u003c")
