"""A worker in a process of its own, so that one that dies or hangs takes nothing with it.

It stays for many requests: to import torch and the rest takes longer than most rows do.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer

from benchmarks.gpu.reasons import last_line
from benchmarks.gpu.workers.worker import MARK

ROOT = Path(__file__).parents[3]
MODULE = "benchmarks.gpu.workers.worker"
NO_TIME = "no time was left for it"
HELD = 256 << 20  # bytes of the card, in a worker that is asked again
# No worker may reach for a network, and none may tell others that it ran.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Worker:
    """Answers requests with findings, until one ends it; then a new one answers the next.

    Attributes:
        answered: whether the last request was answered to its end; if not, `problem` says why.
        timed_out: whether it was cut off.
    """

    def __init__(self, log: Path, deadline: float, python: str = sys.executable):
        """
        Args:
            log: gets what it says on stderr.
            deadline: by `time.monotonic`, when whatever it does is cut off.
        """
        self.log, self.deadline, self.python = log, deadline, python
        self.timed_out, self.answered, self.process, self.reason = False, False, None, ""

    def ask(self, request: dict, seconds: float = float("inf")) -> Iterator[dict]:
        """The findings, one after the other.

        Args:
            request: as `gpu.worker.answer` takes it.
            seconds: that it may take at most.
        """
        left = min(seconds, self.deadline - time.monotonic())
        self.timed_out, self.answered, self.reason = left <= 0, False, ""
        if self.timed_out:
            return
        timer = Timer(left, self._cut_off, [self._running()])
        timer.start()
        try:
            yield from self._findings(request)
        finally:
            timer.cancel()
            if not self.answered:
                self.end()

    def _findings(self, request: dict) -> Iterator[dict]:
        with suppress(BrokenPipeError):  # it has died, and the log says why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if not line.startswith(MARK):
                continue
            findings = json.loads(line.removeprefix(MARK))
            if "failed" in findings:
                self.reason = findings["failed"]
                return
            if "held" in findings:
                self.answered = True
                if findings["held"] > HELD:
                    self.end()
                return
            yield findings

    def _running(self) -> subprocess.Popen:
        if self.process is None:
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(
                    [self.python, "-u", "-m", MODULE],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    errors="replace",
                    cwd=ROOT,
                    env=environment(),
                    start_new_session=True,  # so that what it starts ends with it
                )
        return self.process

    def _cut_off(self, process: subprocess.Popen) -> None:
        self.timed_out = True
        kill(process)

    def end(self) -> None:
        """Let the next request have a new one."""
        if self.process is not None:
            kill(self.process)
            code = self.process.wait()
            if code != -signal.SIGKILL and not self.reason:
                self.reason = last_line(self.log.read_text(errors="replace")) or f"exit code {code}"
            self.process = None

    def problem(self) -> str:
        """Why the last request was not answered to its end."""
        if self.timed_out:
            return NO_TIME
        return self.reason or "killed, as the system does where its memory is used up"


def kill(process: subprocess.Popen) -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Of a worker, whose Python need not have this project installed."""
    found = [str(ROOT), os.environ.get("PYTHONPATH")]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def has(python: str, module: str) -> bool:
    """Whether a module is installed for that Python."""
    code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({module!r}))"
    return subprocess.run([python, "-c", code]).returncode == 0
