"""Ending a run: without losing anything if early, and at a learning rate of 0 if not."""

import os
import shlex
import signal
import sys
import time

import psutil
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

NOT_REPEATED = "--resume_from_checkpoint", "--overwrite_output_dir", "--local_rank"
MOST_SKIPPED = 50
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class EarlyStop(TrainerCallback):
    """Finishes the step, saves and ends when a signal comes or before `max_hours` are over.

    `reason` is why it ended the run, or None if it did not.
    """

    def __init__(self, max_hours: float | None, agree):
        """
        Args:
            max_hours: counted from the start of the process, like a session's limit.
            agree: returns whether something holds on any of the processes.
        """
        self.max_hours, self.agree = max_hours, agree
        self.asked: str | None = None
        self.reason: str | None = None
        self.born = psutil.Process().create_time()
        self.longest = 0.0  # of the steps so far, with what is measured and saved after them

    def on_train_begin(self, args, state, control, **kwargs):
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if state.is_world_process_zero:
            print(f"to stop early and lose nothing: kill -USR1 {os.getpid()}", flush=True)
        self.ended = time.time()

    def _on_signal(self, number, frame):
        self.asked = signal.Signals(number).name
        # Not `print`: the signal may have come in the middle of one.
        os.write(1, f"{self.asked}: finishing the step, then saving\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        now = time.time()
        self.longest, self.ended = max(self.longest, now - self.ended), now
        hours = (now + self.longest - self.born) / 3600  # at the end of one more step
        if self.max_hours is not None and hours > self.max_hours:
            self.asked = self.asked or f"--max_hours {self.max_hours:g}"
        if self.agree(self.asked is not None) and state.global_step < state.max_steps:
            self.reason = self.asked or "a signal to another process"
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """An interrupted epoch has not ended; the resumed run will end it."""
        if self.reason and state.epoch % 1:
            control.should_evaluate = control.should_save = False


class OverflowGuard(TrainerCallback):
    """Ends an fp16 run in which one step after another is skipped.

    A gradient overflows now and then; the loss scaler then scales less.
    """

    def __init__(self, accelerator):
        self.accelerator, self.scaler = accelerator, getattr(accelerator, "scaler", None)
        self.scale, self.in_a_row = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if self.scaler:
            self.scale = self.scaler.get_scale()

    def _was_skipped(self) -> bool:
        if self.scaler is None:
            return self.accelerator.optimizer_step_was_skipped  # as DeepSpeed says
        # Fused optimizers skip steps inside their kernel, which accelerate does not see.
        before, self.scale = self.scale, self.scaler.get_scale()
        return self.scale < before

    def on_step_end(self, args, state, control, **kwargs):
        self.in_a_row = self.in_a_row + 1 if self._was_skipped() else 0
        if self.in_a_row == MOST_SKIPPED:
            what = f"the gradients of {MOST_SKIPPED} steps in a row overflowed"
            raise Diverged(state.global_step, what, [])


class Schedule(TrainerCallback):
    """Keeps the schedule at the run's step, so that it ends with the run.

    In fp16 a step whose gradients overflow is skipped, and the Trainer then leaves out the
    schedule's step, too, unless a fused optimizer skips it unseen. After a few of them the rate
    would end above 0. The schedules that follow the held-out loss have no end, and are left alone.
    So is one that DeepSpeed's own config asks for.
    """

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        lr_scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps some
        if isinstance(lr_scheduler, LambdaLR):
            while lr_scheduler.last_epoch < state.global_step:
                lr_scheduler.step()


class Diverged(Exception):
    """The loss of a micro-batch is not a finite number."""

    def __init__(self, step: int, what: str, names: list[str]):
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        where = f" in a micro-batch of the conversations {some}" if names else ""
        super().__init__(f"step {step}: {what}{where}")


def is_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether all values are finite; a card is waited for."""
    return bool(all_finite(tensors))


def all_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The same as a boolean tensor."""
    return torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all()


def resume_command(deepspeed: bool, processes: int) -> str:
    """The command that resumes this run."""
    own, dropping = [], False
    for word in sys.argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in NOT_REPEATED
        if not dropping:
            own.append(word)
    start = ["deepspeed", f"--num_gpus={processes}"] if deepspeed else ["python3"]
    return shlex.join([*start, *own, "--resume_from_checkpoint", "True"])
