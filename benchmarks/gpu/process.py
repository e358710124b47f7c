"""A worker in a process of its own, so that one that dies or hangs takes nothing with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

from gpu.worker import MARK

ROOT = Path(__file__).parents[2]
NO_TIME = "no time was left for it"
# No worker may reach for a network, and none may tell others that it ran.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


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
        command = [self.python, "-m", "gpu.worker", json.dumps(self.request)]
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


def environment() -> dict[str, str]:
    """Of a worker, whose Python need not have this project installed."""
    found = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def has(python: str, module: str) -> bool:
    """Whether a module is installed for that Python."""
    code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"
    return subprocess.run([python, "-c", code]).returncode == 0
