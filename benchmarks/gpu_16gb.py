"""Peak memory and speed of training a 7B base in 16 GiB, beside the reference and the plan.

python3 benchmarks/gpu_16gb.py

Needs a CUDA card with at least that much memory, and no network: the base is made of random weights
on the spot, and trained on as many tokens as real conversations have. Writes DEVICE.json and
DEVICE.md to docs/results after every row; a run that was cut off goes on with --resume.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

from gpu.process import NO_TIME, ROOT, Process, has
from gpu.results import Results
from gpu.rows import KINDS, OTHERS, Row, jobs

from llama_lora.cli import InputError, one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--gib", type=float, default=16, help="GiB that each training is held to")
    add("--minutes", type=float, default=25, help="for all of it")
    add("--steps", type=int, default=3, help="timed of each row, after one that sets things up")
    add("--only", nargs="+", metavar="TEXT", help="rows with one of these in their names")
    add("--resume", action="store_true", help="keep the rows that DEVICE.json has already")
    add("--shape", choices=KINDS, default="7b", help="of the base; tiny tries the code out")
    add("--unsloth", metavar="PYTHON", default=sys.executable, help="that has unsloth installed")
    add("--cache", type=Path, default=ROOT / ".bench/gpu", help="for the base and logs")
    add("--out", type=Path, default=ROOT / "docs/results", help="folder for the results")
    args = parser.parse_args()
    if args.steps < 1 or args.gib <= 0:
        parser.error("--steps and --gib: expected more than 0")
    return args


@one_line_errors
def main(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    check_device(args)
    args.cache.mkdir(parents=True, exist_ok=True)
    results = Results(args, look_at_device(args, deadline), absent(args))
    results.write()
    for job in jobs(results.missing()):
        measure(job, results, args, deadline)
    print(f"{results.path}\n{results.path.with_suffix('.md')}")


def check_device(args: argparse.Namespace) -> None:
    import torch

    if args.shape == "7b" and not torch.cuda.is_available():
        raise InputError("no CUDA card here; --shape tiny tries the code out on a CPU")


def look_at_device(args: argparse.Namespace, deadline: float) -> dict:
    process = Process(request(args), args.cache / "device.log", deadline)
    found = [findings["device"] for findings in process]
    if not found:
        raise InputError(f"the device cannot be used: {process.problem()}")
    return found[0]


def absent(args: argparse.Namespace) -> list[str]:
    """The contenders that are not installed."""
    return [name for name, module in OTHERS.items() if not has(pythons(args)[name], module)]


def pythons(args: argparse.Namespace) -> dict[str, str]:
    """The Python of each contender: unsloth's pins are not this project's."""
    return defaultdict(lambda: sys.executable, unsloth=args.unsloth)


def measure(job: list[Row], results: Results, args: argparse.Namespace, deadline: float) -> None:
    """Measure the rows of a job, in as many processes as it takes: one that dies loses one row."""
    python = pythons(args)[job[0].contender]
    while job:
        log = args.cache / (re.sub(r"\W+", "-", "-".join(map(str, job[0].job[:4]))) + ".log")
        process = Process(request(args, job), log, deadline, python)
        loaded = False
        for findings in process:
            loaded = True
            results.add(findings)
        missing = [row for row in job if row.name not in results.rows]
        if process.timed_out:
            results.fail(missing, "not run", NO_TIME)
        elif missing:
            results.fail(missing[: 1 if loaded else None], "failed", process.problem())
        job = [row for row in missing if row.name not in results.rows]


def request(args: argparse.Namespace, job: list[Row] | None = None) -> dict:
    """What a worker is asked to do."""
    base = {"folder": str(args.cache / args.shape), "shape": args.shape}
    if job is None:
        return base
    rows = [row.as_dict() for row in job]
    return {**base, "gib": args.gib, "steps": args.steps, "rows": rows}


if __name__ == "__main__":
    main(parse_args())
