"""The corpus path beside fschat's installed scripts: time, memory, and what is left to learn.

python3 -m benchmarks.corpus.stages --write
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import orjson

from benchmarks import pages
from benchmarks.corpus import split_coverage
from benchmarks.corpus.chatgpt_vintages import VINTAGES, chatgpt_html, renderer
from benchmarks.machine import today
from benchmarks.measured_command import Cost, measured
from benchmarks.pages import ROOT, table
from benchmarks.training_runs import PACKAGE, package, stage
from llama_lora.hardware.device import cores

OURS = ROOT / "fastchat/data"
REFERENCE = Path(importlib.util.find_spec("fastchat").origin).parent / "data"
STAGES = {  # the scripts, the same in name on both sides, and what both are told to do
    "merge": ("merge", []),
    "clean": ("clean_sharegpt", []),
    "filter": ("optional_clean", ["--skip-lang", "ko"]),
    "split": ("split_long_conversation", ["--max-length", 512]),
}
FIVE = "five times as much"
PARTS = [*STAGES, FIVE, "help", "windows"]
WINDOWS = 512, 1024, 2048
HELP_RUNS = 3


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "corpus.md")
    add = parser.add_argument
    add("--base", type=Path, default=ROOT / ".demo/base", help="base model folder; made if missing")
    add("--cache", type=Path, default=ROOT / ".bench/corpus", help="folder for downloads and runs")
    add(
        "--share",
        type=float,
        default=1.0,
        help="share of the conversations to use, for a quick look",
    )
    add("--repeats", type=int, default=1, help="runs of each stage, in turn; the fastest counts")
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="parts to run; the others stay as last time",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    folder = args.cache / f"share-{args.share:g}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (args.base / "config.json").exists():
        subprocess.run(["make", "-C", ROOT, ".demo/base/config.json"], check=True)
    memory = folder / "results.json"
    results = json.loads(memory.read_text()) if memory.exists() else {}
    raw = raw_corpus(args, folder)
    for part in PARTS:
        if part in args.parts:
            found = run(part, args, folder, raw)
            results[part] = {"found": found, "date": today(), "repeats": args.repeats}
            memory.write_text(json.dumps(results, indent=1))
    origin = f"{pages.origin()}, one run after the other."
    pages.publish(args, "The corpus path", origin, *sections(results, raw))


def run(part: str, args: argparse.Namespace, folder: Path, raw: Path) -> dict:
    if part == "help":
        return help_times(folder)
    if part == "windows":
        return windows(args, folder, raw)
    if part == FIVE:
        return {
            name: asdict(run_stage("ours", name, args, folder, five_times(raw))) for name in STAGES
        }
    return compared(part, args, folder, raw)


# ---- The corpus ----


def raw_corpus(args: argparse.Namespace, folder: Path) -> Path:
    """The packaged conversations with the answers as ChatGPT's HTML, as they were exported."""
    raw = folder / "raw.json"
    if not raw.exists():
        merged = folder / "packaged.json"
        stage("merge", package(args.cache), merged, "--salvage", "--shuffle", 0)
        whole = split_coverage.items(merged)
        part = whole[: round(args.share * len(whole))]
        raw.write_bytes(orjson.dumps(list(exported(part))))
    return raw


def exported(conversations: list[dict]) -> Iterator[dict]:
    """The conversations as the page held them, in all its vintages."""
    parser = renderer(raw_html=False)
    for item, vintage in zip(conversations, itertools.cycle(VINTAGES), strict=False):
        turns = [
            {**turn, "value": chatgpt_html(parser.render(turn["value"]), vintage)}
            if turn["from"] == "gpt"
            else turn
            for turn in item["conversations"]
        ]
        yield {**item, "conversations": turns}


def five_times(raw: Path) -> Path:
    """Five copies of every conversation that all differ, so that none is a duplicate."""
    longer = raw.with_suffix(".five.json")
    if not longer.exists():
        every = split_coverage.items(raw)
        longer.write_bytes(orjson.dumps([again(item, copy) for copy in range(5) for item in every]))
    return longer


def again(item: dict, copy: int) -> dict:
    """The same conversation with other questions."""
    turns = [
        {**turn, "value": f"({copy}) {turn['value']}"} if turn["from"] == "human" else turn
        for turn in item["conversations"]
    ]
    return {**item, "id": f"{item['id']}-{copy}", "conversations": turns}


# ---- Runs ----


def compared(name: str, args: argparse.Namespace, folder: Path, raw: Path) -> dict:
    """The fastest of the runs of each side, which take turns."""
    found: dict[str, list[Cost]] = {"fschat": [], "ours": [], "ours, one process": []}
    for _ in range(args.repeats):
        for side, costs in found.items():
            costs.append(run_stage(side, name, args, folder, raw))
    return {
        side: asdict(min(costs, key=lambda cost: cost.seconds)) for side, costs in found.items()
    }


def run_stage(side: str, name: str, args: argparse.Namespace, folder: Path, raw: Path) -> Cost:
    """Run a stage on what the stage before it wrote on the same side."""
    script, flags = STAGES[name]
    before = dict(zip(STAGES, [None, *STAGES], strict=False))[name]
    source = output(folder, side, before, raw) if before else raw
    flags = [*flags, *(["--model-name-or-path", args.base] if name == "split" else [])]
    if side == "ours, one process":
        flags += ["--workers", 1]
    scripts = REFERENCE if side == "fschat" else OURS
    target = output(folder, side, name, raw)
    command = [sys.executable, scripts / f"{script}.py", "--in-file", source, "--out-file", target]
    cost = measured([*command, *flags], target.with_suffix(".log"))
    print(f"{raw.stem}: {name}, {side}: {row(cost)}", file=sys.stderr)
    return cost


def output(folder: Path, side: str, name: str, raw: Path) -> Path:
    return folder / f"{raw.stem}-{side.replace(', ', '-').replace(' ', '-')}-{name}.json"


def help_times(folder: Path) -> dict[str, float]:
    """Seconds until each script has told its flags, in the fastest of the runs."""
    return {
        script.name: min(
            measured([sys.executable, script, "--help"], folder / "help.log").seconds
            for _ in range(HELP_RUNS)
        )
        for script in sorted(OURS.glob("*.py"))
    }


def windows(args: argparse.Namespace, folder: Path, raw: Path) -> dict:
    """What each splitter leaves to learn of the same file, at several lengths."""
    source, found = output(folder, "ours", "filter", raw), {}
    for window in WINDOWS:
        for side, scripts in (("fschat", REFERENCE), ("ours", OURS)):
            target = folder / f"{window}-{side}.json"
            script = scripts / "split_long_conversation.py"
            command = [sys.executable, script, "--in-file", source, "--out-file", target]
            flags = ["--model-name-or-path", args.base, "--max-length", window]
            measured([*command, *flags], target.with_suffix(".log"))
            found[f"{window} {side}"] = split_coverage.covered(
                source, target, args.base, window, ours=side == "ours"
            )
            print(f"{window} {side}: {found[f'{window} {side}']}", file=sys.stderr)
    return found


# ---- The page ----


def sections(results: dict, raw: Path) -> Iterator[str]:
    if stages := [name for name in STAGES if name in results]:
        several = any(results[name]["repeats"] > 1 for name in stages)
        what = (
            f"The packaged real conversations of {PACKAGE.replace('==', ' ')} with the answers as "
            f"ChatGPT's HTML, {raw.stat().st_size >> 20} MiB, through the scripts of fschat "
            f"{version('fschat')} as pip installs them and through ours, on {cores()} cores each. "
            f"{'Runs alternate, and the fastest counts. ' if several else ''}Memory is the most "
            "that all processes of a script hold at once; what they share counts once."
        )
        yield from ("## Time and memory", what, table(list(costs(results, stages))))
    if FIVE in results:
        text = f"One run, {results[FIVE]['date']}."
        yield from ("## Memory on a longer file", text, table(list(growth(results))))
    if "help" in results:
        text = f"The fastest of {HELP_RUNS} runs, {results['help']['date']}."
        rows = [
            {"script": name, "seconds to `--help`": f"{seconds:.2f}"}
            for name, seconds in results["help"]["found"].items()
        ]
        yield from ("## Answering `--help`", text, table(rows))
    if "windows" in results:
        text = f"{split_coverage.EXPLANATION} {results['windows']['date']}."
        yield from ("## Splitting", text, table(list(coverage(results))))


def costs(results: dict, stages: list[str]) -> Iterator[dict]:
    """A row for each stage, and one for the whole path."""
    sides = list(results[stages[0]]["found"])
    for name in stages:
        part = results[name]
        count = part["repeats"]
        measured_on = f"{part['date']}, {count} {'run' if count == 1 else 'runs'}"
        cells = {side: row(Cost(**part["found"][side])) for side in sides}
        yield {"stage": name, **cells, "measured": measured_on}
    totals = {}
    for side in sides:
        every = [Cost(**results[name]["found"][side]) for name in stages]
        totals[side] = Cost(
            sum(one.seconds for one in every),
            sum(one.processor for one in every),
            max(one.memory for one in every),
        )
    cells = {side: row(cost) for side, cost in totals.items()}
    yield {"stage": "**in all**", **cells, "measured": ""}
    times = {
        side: f"{totals['fschat'].seconds / cost.seconds:.2f} ×" for side, cost in totals.items()
    }
    yield {"stage": "speed", **times, "measured": ""}


def growth(results: dict) -> Iterator[dict]:
    """A row for each stage; how much more memory it took, where it ran on the file itself."""
    for name, cost in results[FIVE]["found"].items():
        once = results[name]["found"]["ours"]["memory"] if name in results else None
        yield {
            "stage": name,
            "peak": f"{once >> 20} MiB" if once else "–",
            f"peak on {FIVE}": f"{cost['memory'] >> 20} MiB",
            "change": f"{cost['memory'] / once - 1:+.0%}" if once else "–",
            "seconds": f"{cost['seconds']:.1f}",
        }


def coverage(results: dict) -> Iterator[dict]:
    for name, found in results["windows"]["found"].items():
        window, side = name.split(" ")
        yield {"window": window, "": side, **split_coverage.row(found)}


def row(cost: Cost) -> str:
    return f"{cost.seconds:.1f} s ({cost.processor:.1f} s CPU), {cost.memory >> 20} MiB"


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(parse_args())
