"""A command's wall time, processor time and peak memory, with all the processes that it starts."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

INTERVAL = 0.2  # seconds between two looks at the memory; a look takes some milliseconds


@dataclass
class Cost:
    """Seconds on the clock and of all processors, and the most memory held at once, in bytes."""

    seconds: float
    processor: float
    memory: int


def measured(command: list, log: Path) -> Cost:
    """Run the command, with what it prints in `log`; ends the benchmark if it fails."""
    before, began = getrusage(RUSAGE_CHILDREN), time.monotonic()
    memory = 0
    with open(log, "wb") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
        while True:
            memory = max(memory, held(process.pid))
            try:
                code = process.wait(INTERVAL)
                break
            except subprocess.TimeoutExpired:
                pass
    seconds, after = time.monotonic() - began, getrusage(RUSAGE_CHILDREN)
    if code:
        sys.exit(f"error: exit code {code} of {' '.join(map(str, command))}, see {log}")
    processor = sum(
        getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime")
    )
    return Cost(seconds, processor, memory)


def held(process: int) -> int:
    """Bytes that the process and its descendants hold; pages that they share count once."""
    return sum(map(proportional, family(process)))


def family(process: int) -> Iterator[int]:
    yield process
    with suppress(OSError):  # it may just have ended
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child))


def proportional(process: int) -> int:
    """A process's own pages and its share of those it has in common with others."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
