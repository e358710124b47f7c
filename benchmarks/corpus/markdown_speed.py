"""The processor time that cleaning takes, beside fschat's, on real chats rendered to raw HTML.

python3 -m benchmarks.corpus.markdown_speed --write

Each side cleans the same conversations in a process of its own, one after the other, in turns.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median

from benchmarks import pages
from benchmarks.corpus.chatgpt_vintages import VINTAGES, chatgpt_html, renderer
from benchmarks.corpus.markdown_fidelity import fschat_cleaning
from benchmarks.machine import machine
from benchmarks.pages import ROOT
from benchmarks.training_runs import package
from llama_lora.corpus.clean.cleaner import Cleaner, blocked_phrases
from llama_lora.corpus.records import reader
from llama_lora.corpus.records.conversation import Rejected

SIDES = "this project", "fschat"


def main(args: argparse.Namespace) -> None:
    args.cache.mkdir(exist_ok=True)
    raw = args.cache / f"raw-{args.limit}.json"
    if args.side:
        print(json.dumps(seconds(args.side, json.loads(raw.read_text(encoding="utf-8")))))
        return
    if not raw.exists():
        conversations = list(rendered(args.corpus or package(args.cache), args.limit))
        raw.write_text(json.dumps(conversations, ensure_ascii=False), encoding="utf-8")
    took: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, "-W", "ignore", *pages.this(), "--side", side]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            took[side].append(json.loads(printed))
    ours, theirs = (median(took[side]) for side in SIDES)
    size = raw.stat().st_size / 1e6
    figures = {
        "this project": f"{ours:.1f}",
        "fschat": f"{theirs:.1f}",
        "ratio": f"{ours / theirs:.2f}",
    }
    seconds_of = f"seconds of processor time, median of {args.rounds}"
    pages.publish_part(
        args,
        f"{machine()}. {args.limit:,} conversations, {size:.0f} MB of raw HTML.",
        pages.table([{"": who, seconds_of: told} for who, told in figures.items()], left=1),
    )


def rendered(corpus: str | Path, limit: int):
    """The first conversations that begin with a question, as exports of the page."""
    parser, vintages = renderer(raw_html=False), itertools.cycle(VINTAGES)
    records = (json.loads(record.raw) for record in reader.read(str(corpus), salvage=True))
    usable = (
        item
        for item in records
        if item["conversations"] and item["conversations"][0]["from"] == "human"
    )
    for item in itertools.islice(usable, limit):
        vintage = next(vintages)
        for turn in item["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = chatgpt_html(parser.render(turn["value"]), vintage)
        yield item


def seconds(side: str, conversations: list[dict]) -> float:
    """Processor time that one side takes for all the conversations."""
    if side == "fschat":
        clean = fschat_cleaning().clean_html_one_sample
        conversations = copy.deepcopy(conversations)
    else:
        clean = Cleaner(blocked_phrases(None))
    began = os.times().user
    for conversation in conversations:
        with suppress(Rejected):
            clean(conversation)
    return os.times().user - began


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "markdown.md")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="folder of downloads")
    parser.add_argument(
        "--corpus", help="file of the packaged conversations, if it is already here"
    )
    parser.add_argument("--limit", type=int, default=1500, help="how many conversations")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
