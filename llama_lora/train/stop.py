"""Ending a run early with nothing lost: on a signal, at a time, on a loss that is no number."""

import shlex
import signal
import sys
import time

import psutil
import torch
from transformers import TrainerCallback

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class Stop(TrainerCallback):
    """Finishes the step, saves and ends when a signal comes or before `max_hours` are over.

    `reason` is why it ended the run, None where it did not.
    """

    def __init__(self, max_hours: float | None, agree):
        """
        Args:
            max_hours: counted from the start of the process, as a session's limit is.
            agree: tells whether something holds on any of the processes.
        """
        self.max_hours, self.agree = max_hours, agree
        self.asked: str | None = None
        self.reason: str | None = None
        self.born = psutil.Process().create_time()
        self.step_began = self.longest = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self.asked = signal.Signals(number).name
        print(f"{self.asked}: finishing the step, then saving", flush=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.time()
        self.longest = max(self.longest, now - self.step_began)
        hours = (now + self.longest - self.born) / 3600  # at the end of one step more
        if self.max_hours is not None and hours > self.max_hours:
            self.asked = self.asked or f"--max_hours {self.max_hours:g}"
        if self.agree(self.asked is not None) and state.global_step < state.max_steps:
            self.reason = self.asked or "a signal to another process"
            control.should_save = control.should_training_stop = True


class Diverged(Exception):
    """The loss of a micro-batch is not a finite number."""

    def __init__(self, step: int, what: str, names: list[str]):
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        super().__init__(f"step {step}: {what} in a micro-batch of the conversations {some}")


def is_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every value is."""
    return bool(torch.stack([tensor.float().sum().isfinite() for tensor in tensors]).all())


def resume_command(deepspeed: bool, processes: int) -> str:
    """The command that goes on where this run stopped."""
    words, own = iter(sys.argv), []
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--resume_from_checkpoint", "--overwrite_output_dir", "--local_rank"):
            value or next(words, None)
        else:
            own.append(word)
    start = ["deepspeed", f"--num_gpus={processes}"] if deepspeed else ["python3"]
    return shlex.join([*start, *own, "--resume_from_checkpoint", "True"])
