"""Memory, speed and correctness of training a 7B base in a 16 GB card, beside a reference.

python3 benchmarks/gpu_16gb.py

Needs a CUDA card with at least that much memory, and no network: bases are made of random weights
on the spot, and trained on as many tokens as real conversations have. Writes DEVICE.json to
docs/results and the page docs/gpu.md after every row, the most telling rows first. What there is no
time for, a later call measures with --resume.
"""

import argparse
import re
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # it also runs where this project is not installed

from benchmarks.gpu.report.results import Results, write_page  # noqa: E402
from benchmarks.gpu.rows import CHECKS, KINDS, OTHERS, Row  # noqa: E402
from benchmarks.gpu.workers.process import Worker, has  # noqa: E402
from llama_lora.cli import InputError, one_line_errors  # noqa: E402
from llama_lora.options import Help  # noqa: E402

CHECKING = 90  # seconds, at most


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add(
        "--gib",
        type=float,
        default=14.6,
        help="memory limit of each training, in GiB; a T4 has 14.6",
    )
    add("--minutes", type=float, default=8.5, help="time limit of the whole run")
    add(
        "--steps",
        type=int,
        default=3,
        help="timed steps of each row, after one that sets things up",
    )
    add(
        "--only",
        nargs="+",
        metavar="TEXT",
        help="measure only rows with one of these in their names",
    )
    add("--resume", action="store_true", help="continue from the JSON file of an earlier run")
    add("--shape", choices=KINDS, default="full", help="size of the bases; tiny tries out the code")
    add(
        "--unsloth",
        metavar="PYTHON",
        default=sys.executable,
        help="a Python that has unsloth installed",
    )
    add("--cache", type=Path, default=ROOT / ".bench/gpu", help="folder for bases (32 GB) and logs")
    help = "folder for the results; default: docs/results, with --shape tiny in the cache"
    add("--out", type=Path, help=help)
    add("--page", action="store_true", help="only rewrite the page from the files in --out")
    args = parser.parse_args()
    if args.steps < 1 or args.gib <= 0 or args.minutes <= 0:
        parser.error("--steps, --gib and --minutes: expected more than 0")
    tiny = args.cache.absolute() / "results"
    args.out = args.out or (tiny if args.shape == "tiny" else ROOT / "docs/results")
    return args


@one_line_errors
def main(args: argparse.Namespace) -> None:
    if args.page:
        print(write_page(args.out))
        return
    deadline = time.monotonic() + 60 * args.minutes
    args.cache = args.cache.absolute()
    args.cache.mkdir(parents=True, exist_ok=True)
    with Workers(args, deadline) as workers:
        results = Results(args, look(workers.shared, args), absent(args))
        results.add_rates(only_finding(workers.shared, request(args, rates=True)))
        for job in results.jobs():
            if job == CHECKS:
                check(workers.shared, results, args)
            else:
                measure(job, workers.of(job[0]), results, args)
    tell_what_remains(results)


class Workers:
    """One for all contenders but unsloth, whose pins, and patches, are its own; one at a time."""

    def __init__(self, args: argparse.Namespace, deadline: float):
        self.workers = {
            name: Worker(args.cache / f"{name}.log", deadline, python_of(name, args))
            for name in ("worker", "unsloth")
        }

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for worker in self.workers.values():
            worker.end()

    @property
    def shared(self) -> Worker:
        return self.workers["worker"]

    def of(self, row: Row) -> Worker:
        """The one for the rows of a job like this; the other would take its part of the card."""
        chosen = "unsloth" if row.contender == "unsloth" else "worker"
        for name, worker in self.workers.items():
            if name != chosen or row.fresh:
                worker.end()
        return self.workers[chosen]


def look(worker: Worker, args: argparse.Namespace) -> dict:
    """The device; what is missing is told at once, before anything that takes time."""
    found = only_finding(worker, {"look": True})
    if found["missing"]:
        print(*(f"error: {line}" for line in found["missing"]), sep="\n", file=sys.stderr)
        sys.exit(1)
    if found["missing_for_scripts"]:
        lacking = ", ".join(found["missing_for_scripts"])
        print(f"not installed: {lacking}; so the scripts that are checked will fail")
    if args.shape == "full" and found["device"]["capability"] is None:
        raise InputError("no CUDA card here; --shape tiny tries the code out on a CPU")
    return found["device"]


def only_finding(worker: Worker, asked: dict) -> dict:
    found = list(worker.ask(asked))
    if not worker.answered:
        raise InputError(worker.problem())
    return found[0]


def request(args: argparse.Namespace, **what) -> dict:
    """What a worker is asked for, and on which bases."""
    return {"cache": str(args.cache), "shape": args.shape, **what}


def absent(args: argparse.Namespace) -> list[str]:
    """The contenders that are not installed."""
    return [name for name, module in OTHERS.items() if not has(python_of(name, args), module)]


def python_of(contender: str, args: argparse.Namespace) -> str:
    return args.unsloth if contender == "unsloth" else sys.executable


def check(worker: Worker, results: Results, args: argparse.Namespace) -> None:
    for found in worker.ask(request(args, checks=results.checks_done), CHECKING):
        results.add_check(found["check"], found["outcome"])
    results.end_checks("" if worker.answered else worker.problem())


def measure(job: list[Row], worker: Worker, results: Results, args: argparse.Namespace) -> None:
    """Measure the rows of a job; a worker that dies loses one of them, and the next goes on."""
    while job:
        rows, begun = [row.as_dict() for row in job], None
        for findings in worker.ask(request(args, rows=rows, gib=args.gib, steps=args.steps)):
            if "begins" in findings:
                begun = findings["begins"]
            else:
                results.add(findings)
        if worker.answered or worker.timed_out:
            return
        results.fail([begun] if begun else rows, worker.problem())
        missing = results.missing()
        job = [row for row in job if row in missing]


def tell_what_remains(results: Results) -> None:
    print(f"{results.path}\n{results.page}")
    if remaining := len(results.missing()) + len(results.failed):
        command = [*sys.argv, *["--resume"] * ("--resume" not in sys.argv)]
        told = re.sub(r"^\S*/(?=benchmarks/)", "", shlex.join(command))
        print(f"{remaining} of {len(results.wanted)} remain: python3 {told}")
    else:
        print(f"all {len(results.wanted)} are measured")


if __name__ == "__main__":
    main(parse_args())
