"""Trains for some seconds on a tiny base made on the spot: does it learn, and how fast?"""

import contextlib
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from llama_lora.check_machine.kernels_used import Operators, attention
from llama_lora.hardware.cards import GIB
from llama_lora.hardware.device import dtype_name, resolve_quantization
from llama_lora.train import lora_model
from llama_lora.train.arguments import DataArguments, LoraArguments, TrainingArguments
from llama_lora.train.data import micro_batches
from llama_lora.train.data.example import Example
from llama_lora.train.data.packing import MicroBatches
from llama_lora.train.logs import LogFile, LogLine, quieten
from llama_lora.train.memory.peak import peak_memory
from llama_lora.train.stopping import EarlyStop
from llama_lora.train.trainer import LoraTrainer

WORDS, WIDTH, LAYERS, HEADS = 1024, 256, 4, 2  # heads of 128, as a 7B's
ROW = 512  # tokens
LENGTHS = 256, 128, 64, 64  # of the examples in a row, which fill every micro-batch
PERIOD = 32  # words, after which the training text repeats
FEWEST = 10  # steps, however long they take; they make the loss fall by a fifth
LEAST_FALL = 0.1


@dataclass(frozen=True)
class ShortRun:
    """How a training went.

    Attributes:
        dtype: what it computed in.
        losses: of each step.
        tokens: per step.
        seconds: of all steps but the first, in which libraries set themselves up.
        peak: bytes of the card's memory or, without a card, of this process.
        attention: the kernels that it used.
    """

    quantization: str
    dtype: torch.dtype
    losses: list[float]
    tokens: int
    seconds: float
    peak: int
    attention: str

    @property
    def learned(self) -> bool:
        """Whether the loss has fallen."""
        return self.losses[-1] <= (1 - LEAST_FALL) * self.losses[0]  # so that NaN fails, too

    @property
    def tokens_per_second(self) -> float:
        return self.tokens * (len(self.losses) - 1) / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.quantization} base, {dtype_name(self.dtype)}: loss {self.losses[0]:.2f} → "
            f"{self.losses[-1]:.2f} in {len(self.losses):,} steps of {self.tokens:,} tokens, "
            f"{self.tokens_per_second:,.0f} tokens/s, peak memory {self.peak / GIB:.2f} GiB, "
            f"attention {self.attention}"
        )


def train(seconds: float | None = None, learning_rate: float | None = None) -> ShortRun:
    """Train as train_lora.py does, in the precision and dtype that it chooses here by itself.

    Args:
        seconds: after the first step; at least `FEWEST` steps; default: 20 on a card, else 5.
        learning_rate: default: the one that training chooses by itself.

    Raises:
        InputError: one of training's own checks fails, or the loss is not finite.
        RuntimeError: the device has no kernel for this.
    """
    on_card = torch.cuda.is_available()
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if seconds is None:
        seconds = 20 if on_card else 5
    quantization, _ = resolve_quantization("auto")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            output_dir=str(Path(folder, "output")),
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            max_steps=10**9,  # the clock ends it
            save_strategy="no",
            report_to="none",
            per_device_train_batch_size="8" if on_card else "1",
        )
        quieten(args)
        transformers.utils.logging.disable_progress_bar()
        model = lora_model.load(_base(Path(folder, "base")), quantization, LoraArguments(), args)
        training = _text(args)
        trainer = WatchedTrainer(model, args, training)
        clock = Clock(seconds)
        trainer.add_callback(clock)
        trainer.train()
    return ShortRun(
        quantization=quantization,
        dtype=args.compute_dtype,
        losses=[log["loss"] for log in trainer.state.log_history if "loss" in log],
        tokens=training.fullest,
        seconds=clock.ended - clock.began,
        peak=peak_memory(),
        attention=attention(trainer.operators.names),
    )


def _base(folder: Path) -> str:
    """Fill the folder with a Llama of random weights; returns its path."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=ROW,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


class ExampleList(list):
    """Examples, with their `lengths` in tokens."""

    @property
    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self]


def _text(args) -> MicroBatches:
    """Pieces of one text that repeats itself, with all tokens labelled."""
    draw = np.random.default_rng(0)
    words = draw.choice(np.arange(3, WORDS, dtype=np.int32), PERIOD, replace=False)
    texts = ExampleList()
    for row in range(16 * args.per_device_train_batch_size):
        for length in LENGTHS:
            ids = np.resize(np.roll(words, draw.integers(PERIOD)), length)
            texts.append(Example(f"text {row}", f"text {row}", ids, ids))
    return micro_batches.training_batches(texts, DataArguments("", model_max_length=ROW), args)


class WatchedTrainer(LoraTrainer):
    """Trains without log, checkpoints and tokenizer; `operators` are those of its first step."""

    def __init__(self, model, args, training: MicroBatches):
        nothing = SimpleNamespace(tokenizer=None)
        super().__init__(model, args, nothing, training, None, {}, 1, training.fullest)
        for callback in LogLine, LogFile, EarlyStop:
            self.remove_callback(callback)
        self.operators = Operators()

    def training_step(self, *args, **kwargs):
        with contextlib.nullcontext() if self.state.global_step else self.operators:
            return super().training_step(*args, **kwargs)


class Clock(TrainerCallback):
    """Ends a training so many seconds after its first step."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended = time.perf_counter()
        if state.global_step == 1:
            self.began = self.ended
        elif state.global_step >= FEWEST and self.ended - self.began >= self.seconds:
            control.should_training_stop = True
