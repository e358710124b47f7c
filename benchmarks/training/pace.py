"""What speeds of training are measured on, and a contender's pace there."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks import training_runs as runs

PIECES = 600  # of each length
ARRANGED = r"in ([\d,]+) micro-batches of \d+ × \d+ tokens, ([\d.]+)% full"


@dataclass
class Corpus:
    """What all train on: a file of pieces and the rows to put them in."""

    name: str
    length: int
    path: Path
    pieces: int
    tokens: int
    labelled: int  # tokens of answers, each counted once
    attended: int  # the squares of the pieces' tokens, summed


def make_corpus(name: str, source: Path, length: int, args: argparse.Namespace) -> Corpus:
    from llama_lora.model.labels import IGNORE
    from llama_lora.model.template import Template, load_tokenizer

    items = runs.draw(runs.pieces(source, args.base, length, args.cache), PIECES)
    path = runs.write(items, args.cache / f"speed-{name}-{length}.json")
    encoded = Template(load_tokenizer(args.base)).encode_batch(items)
    lengths = [len(piece.ids) for piece in encoded]
    labelled = sum(label != IGNORE for piece in encoded for label in piece.labels)
    attended = sum(count**2 for count in lengths)
    return Corpus(name, length, path, len(items), sum(lengths), labelled, attended)


def batch(corpus: Corpus, args: argparse.Namespace) -> int:
    return max(1, args.tokens // corpus.length)


def arranged(run: runs.Run) -> tuple[int, float]:
    """The steps of an epoch and the share of their room with tokens in it, as training printed."""
    found = run.found(ARRANGED)
    return int(found[1].replace(",", "")), float(found[2]) / 100


def measured(
    trainings: list[runs.Run], steps_per_epoch: float, fill: float, corpus: Corpus
) -> dict:
    """The rate and memory of a contender.

    The few steps of a run differ in how much of them is answer. So the rate is what the whole
    corpus holds of labelled tokens over the time of an epoch at the pace of the timed steps.
    """

    def rate(seconds_per_step: float) -> float:
        return corpus.labelled / (steps_per_epoch * seconds_per_step)

    paces = [training.seconds_per_step for training in trainings]
    return {
        "labelled tokens/s": rate(sum(paces) / len(paces)),
        "of each run": [rate(pace) for pace in paces],
        "seconds per step": paces,
        "steps per epoch": steps_per_epoch,
        "fill": fill,
        "peak memory": max(training.peak_memory for training in trainings),
    }


def ratios(ours: dict, other: dict) -> list[float]:
    """How many times as fast ours was in each pair of runs."""
    pairs = zip(ours["of each run"], other["of each run"], strict=True)
    return [own / rate for own, rate in pairs]
