"""What all who train have in common: the task, the clock, the optimizer, and the figures."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.contenders import lengths
from benchmarks.gpu.contenders.card import SmallCard
from benchmarks.gpu.rows import ALL_LINEAR, Row
from llama_lora.hardware.device import compute_dtype, dtype_name
from llama_lora.model.base import load_base
from llama_lora.model.folder.shape import shape_of

ALPHA, DROPOUT, LEARNING_RATE = 16, 0.05, 2e-5
ENOUGH = 10  # seconds of timed steps


@dataclass
class Task:
    """What one process is to measure with one model.

    Attributes:
        folder: of the base.
        scale: by which the lengths of real conversations are divided.
        steps: that are timed, after one that sets things up.
        rows: all with the same contender, quantization, dtype and LoRA.
    """

    folder: Path
    scale: int
    steps: int
    rows: list[Row]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def quantization(self) -> str:
        return self.first.quantization

    @property
    def dtype(self) -> torch.dtype:
        """That is computed in; a CPU takes its fastest, whatever is asked for."""
        as_asked = self.first.dtype == "float16" and torch.cuda.is_available()
        return torch.float16 if as_asked else compute_dtype()


class Clock:
    """The ends of steps; the first step sets things up, and what follows is timed."""

    def __init__(self, card: SmallCard, steps: int):
        """`steps` are those to time; fewer, but one at least, where they take `ENOUGH` seconds."""
        self.card, self.steps, self.ends = card, steps, []

    def goes_on(self) -> bool:
        """Whether there is a step left to time."""
        return self.timed < 1 or (self.timed < self.steps and self.seconds < ENOUGH)

    @property
    def timed(self) -> int:
        """Steps that were timed so far."""
        return len(self.ends) - 1

    def tick(self) -> None:
        """A step has ended. Raises `torch.OutOfMemoryError` where it took too much of a host."""
        self.card.wait()
        self.card.check()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[0]


class Contender:
    """Whoever trains, with a model on `card`."""

    def __init__(self, task: Task, card: SmallCard):
        self.task, self.card = task, card
        self.model, self.shape = self.load(), shape_of(task.folder)

    def load(self):
        """The model with LoRA matrices to train."""
        raise NotImplementedError

    def plain_base(self):
        """The base as it is loaded here, but with the attention that transformers gives it."""
        task = self.task
        base = load_base(task.folder, task.quantization, task.dtype, self.card.device)
        base.set_attn_implementation("sdpa")
        return base

    def lora_config(self):
        """For peft, which knows "all-linear" as one word."""
        from peft import LoraConfig

        row = self.task.first
        return LoraConfig(
            r=row.rank,
            lora_alpha=ALPHA,
            target_modules=row.targets[0] if row.targets == ALL_LINEAR else list(row.targets),
            lora_dropout=DROPOUT,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def measure(self, row: Row) -> Iterator[dict]:
        """Findings of a row, the last of which stands; raises where memory runs out."""
        raise NotImplementedError

    def checks(self) -> dict[str, str]:
        """What has to hold before anything is measured, and whether it does."""
        return {}

    def pieces(self, row: Row) -> lengths.Pieces:
        return lengths.pieces(row.window, self.task.scale, self.shape.config.vocab_size)

    def found(self, clock: Clock, pieces: lengths.Pieces, share: float) -> dict:
        """The figures of a row whose timed steps were that share of an epoch.

        The few steps differ in how much of them is answer, so rates are those of the whole epoch
        at their pace.
        """
        tokens = sum(pieces.lengths) * share / clock.seconds
        labelled = pieces.labelled * share / clock.seconds
        # Frozen weights cost 2 a token forward and 2 backward, the head for labelled tokens alone.
        flops = 4 * (self.shape.linear * tokens + self.shape.head * labelled)
        return {
            "steps": clock.timed,
            "seconds_per_step": clock.seconds / clock.timed,
            "tokens_per_second": tokens,
            "labelled_per_second": labelled,
            "useful_flops": flops,
            "dtype": dtype_name(self.task.dtype),
            **self.card.peak(),
        }


class Optimization:
    """AdamW behind a loss scaler and clipping, as the Trainer has them."""

    def __init__(self, model, optim: str, dtype: torch.dtype, device: torch.device):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer_class(optim)(self.parameters, lr=LEARNING_RATE)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(self, loss: torch.Tensor) -> None:
        """Go backward from `loss` and change the parameters."""
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def optimizer_class(name: str) -> Callable:
    """By the name of --optim."""
    if "8bit" in name:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    return torch.optim.AdamW


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """As the Trainer computes in `dtype`; fp32 needs none."""
    mixed = dtype != torch.float32
    return torch.autocast(device.type, dtype if mixed else None, enabled=mixed)
