"""Peak memory and speed of training a 7B base in 16 GiB, beside the reference and the plan.

python3 benchmarks/gpu_16gb.py

Needs a CUDA card with at least that much memory, and no network: the base is made of random weights
on the spot, and trained on as many tokens as real conversations have. Writes DEVICE.json and
DEVICE.md to docs/results after every row; a run that was cut off goes on with --resume.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from threading import Timer

import gpu_page
import gpu_rows
from gpu_rows import Row
from gpu_worker import MARK, versions
from machine import processor, today

from llama_lora.cli import InputError, one_line_errors

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("gpu_worker.py")
OTHERS = {"unsloth": "unsloth", "TRL": "trl"}  # contenders and the modules that they need
NO_TIME = "no time was left for it"
# No worker may reach for a network, and none may tell others that it ran.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


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
    add(
        "--shape",
        choices=gpu_rows.KINDS,
        default="7b",
        help="of the base; tiny tries the code out",
    )
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
    results = Results(args, look_at_device(args, deadline))
    results.write()
    for job in gpu_rows.jobs(results.missing()):
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


def measure(job: list[Row], results: "Results", args: argparse.Namespace, deadline: float) -> None:
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


def pythons(args: argparse.Namespace) -> dict[str, str]:
    """The Python of each contender: unsloth's pins are not this project's."""
    return defaultdict(lambda: sys.executable, unsloth=args.unsloth)


def has(python: str, module: str) -> bool:
    """Whether a module is installed for that Python."""
    code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"
    return subprocess.run([python, "-c", code]).returncode == 0


def request(args: argparse.Namespace, job: list[Row] | None = None) -> dict:
    """What a worker is asked to do."""
    base = {"folder": str(args.cache / args.shape), "shape": args.shape}
    if job is None:
        return base
    rows = [row.as_dict() for row in job]
    return {**base, "gib": args.gib, "steps": args.steps, "rows": rows}


def environment() -> dict[str, str]:
    """Of a worker, whose Python need not have this project installed."""
    found = [str(ROOT), os.environ.get("PYTHONPATH")]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, found))}


class Process:
    """A worker that is asked for something; iterate over its findings."""

    def __init__(self, request: dict, log: Path, deadline: float, python: str = sys.executable):
        self.request, self.log, self.deadline, self.python = request, log, deadline, python
        self.timed_out, self.returncode = False, None

    def __iter__(self):
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.timed_out = True
            return
        command = [self.python, str(WORKER), json.dumps(self.request)]
        with open(self.log, "w") as log:
            worker = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment(),
            )
        timer = Timer(left, self._end, [worker])
        timer.start()
        try:
            for line in worker.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
        except BaseException:
            worker.kill()
            raise
        finally:
            timer.cancel()
            self.returncode = worker.wait()

    def _end(self, worker: subprocess.Popen) -> None:
        self.timed_out = True
        worker.kill()

    def problem(self) -> str:
        """The last line of its log."""
        if self.timed_out:
            return NO_TIME
        lines = [line.strip() for line in self.log.read_text().splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.returncode}"


class Results:
    """All that was found, on disk after each finding."""

    def __init__(self, args: argparse.Namespace, device: dict):
        self.settings = {"shape": args.shape, "gib": args.gib, "steps": args.steps}
        self.device = device
        self.path = args.out / f"{slug(device['name'], args.shape)}.json"
        others = [name for name, module in OTHERS.items() if has(pythons(args)[name], module)]
        self.absent = [name for name in OTHERS if name not in others]
        self.order = [row.name for row in every_row(args, list(OTHERS))]
        self.wanted = wanted_rows(args, others)
        self.rows, self.models = self._earlier() if args.resume else ({}, {})

    def _earlier(self) -> tuple[dict, dict]:
        """What a run with the same settings measured before."""
        if not self.path.is_file():
            return {}, {}
        told = json.loads(self.path.read_text())
        if told["settings"] != self.settings:
            raise InputError(f"{self.path}: made with {told['settings']}, not {self.settings}")
        done = "measured", "out of memory"
        rows = {name: row for name, row in told["rows"].items() if row["status"] in done}
        return rows, told["models"]

    def _place(self, name: str) -> tuple[int, int]:
        """Where a row stands: beside those of its size, what is tried with fewer rows last."""
        sizes = [one.partition(" × ")[0] for one in self.order]
        known = self.order.index(name) if name in self.order else len(self.order)
        return sizes.index(name.partition(" × ")[0]), known

    def missing(self) -> list[Row]:
        return [row for row in self.wanted if row.name not in self.rows]

    def add(self, findings: dict) -> None:
        if "loaded" in findings:
            self.models[", ".join(map(str, findings.pop("loaded")))] = findings
        else:
            name = findings["row"]["name"]
            self.rows[name] = findings
            print(gpu_page.line(name, findings), flush=True)
        self.write()

    def fail(self, rows: list[Row], status: str, note: str) -> None:
        for row in rows:
            self.add({"row": row.as_dict(), "status": status, "note": note})

    def write(self) -> None:
        from llama_lora.corpus.atomic import replacing

        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = self.as_dict()
        files = {".json": json.dumps(told, indent=1) + "\n", ".md": gpu_page.page(told)}
        for suffix, text in files.items():
            with replacing(str(self.path.with_suffix(suffix))) as file:
                file.write(text.encode())

    def as_dict(self) -> dict:
        return {
            "device": self.device,
            "processor": processor(),
            "date": today(),
            "versions": versions(),
            "settings": self.settings,
            "absent": self.absent,
            "models": self.models,
            "rows": {name: self.rows[name] for name in sorted(self.rows, key=self._place)},
        }


def every_row(args: argparse.Namespace, others: list[str]) -> list[Row]:
    kind = gpu_rows.KINDS[args.shape]
    return gpu_rows.all_rows(kind.scale, kind.most, others)


def wanted_rows(args: argparse.Namespace, others: list[str]) -> list[Row]:
    rows = every_row(args, others)
    if not args.only:
        return rows
    chosen = [row for row in rows if any(text in row.name for text in args.only)]
    if not chosen:
        names = "; ".join(row.name for row in rows)
        raise InputError(f"--only {' '.join(args.only)}: no such row; there are {names}")
    return chosen


def slug(name: str, shape: str) -> str:
    """The name of the files for a device: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    named = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return named if shape == "7b" else f"{named}-{shape}"


if __name__ == "__main__":
    main(parse_args())
