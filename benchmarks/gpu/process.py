"""A worker in a process of its own, so that one that dies or hangs takes nothing with it.

It stays for many requests: to import torch and the rest takes longer than most rows do.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

from gpu.worker import MARK

ROOT = Path(__file__).parents[2]
NO_TIME = "no time was left for it"
SPARE = 64 << 20  # bytes that a worker may still hold after a request, and be asked again
# No worker may reach for a network, and none may tell others that it ran.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Worker:
    """Answers requests with findings, until one ends it; then a new one answers the next."""

    def __init__(self, log: Path, deadline: float, python: str = sys.executable):
        """
        Args:
            log: gets what it says on stderr.
            deadline: by `time.monotonic`, when whatever it does is cut off.
        """
        self.log, self.deadline, self.python = log, deadline, python
        self.timed_out, self.answered, self.process = False, False, None

    def ask(self, request: dict, seconds: float = float("inf")) -> Iterator[dict]:
        """The findings, one after the other; where it was not `answered`, `problem` says why.

        Args:
            request: as `gpu.worker.answer` takes it.
            seconds: that it may take at most.
        """
        left = min(seconds, self.deadline - time.monotonic())
        self.timed_out, self.answered = left <= 0, False
        if self.timed_out:
            return
        process = self._running()
        timer = Timer(left, self._cut_off, [process])
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if not line.startswith(MARK):
                    continue
                findings = json.loads(line.removeprefix(MARK))
                if "held" in findings:
                    self.answered = True
                    if findings["held"] > SPARE:
                        self.end()
                    return
                yield findings
            process.wait()
        except BrokenPipeError:
            process.wait()
        except BaseException:
            self.end()
            raise
        finally:
            timer.cancel()

    def _running(self) -> subprocess.Popen:
        if self.process is None or self.process.poll() is not None:
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(
                    [self.python, "-u", "-m", "gpu.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=ROOT,
                    env=environment(),
                )
        return self.process

    def _cut_off(self, process: subprocess.Popen) -> None:
        self.timed_out = True
        process.kill()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def problem(self) -> str:
        """Why there are no more findings: the last line of its log."""
        if self.timed_out:
            return NO_TIME
        lines = [line.strip() for line in self.log.read_text().splitlines() if line.strip()]
        code = self.process.returncode if self.process else None
        return lines[-1][:300] if lines else f"exit code {code}"


def environment() -> dict[str, str]:
    """Of a worker, whose Python need not have this project installed."""
    found = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def has(python: str, module: str) -> bool:
    """Whether a module is installed for that Python."""
    code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"
    return subprocess.run([python, "-c", code]).returncode == 0
