"""This project's training: what train_lora.py loads, with the parts that its Trainer is made of."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.backends import cuda
from transformers.training_args import OptimizerNames

from benchmarks.gpu.contenders import lengths
from benchmarks.gpu.contenders.contender import (
    ALPHA,
    DROPOUT,
    ENOUGH,
    LEARNING_RATE,
    Clock,
    Contender,
    Optimization,
    autocast,
)
from benchmarks.gpu.contenders.profiles import profile
from benchmarks.gpu.rows import SEARCHING, Row
from llama_lora.cli import InputError, out_of_memory
from llama_lora.model.adapter import trainable
from llama_lora.model.labels import IGNORE
from llama_lora.train import lora_model, preparation
from llama_lora.train.compute import attention_kernels, chunked_loss
from llama_lora.train.compute.attention_kernels import EFFICIENT, LOOP, log_sums, sum_rows
from llama_lora.train.data import packing
from llama_lora.train.data.packing import MicroBatches, collate
from llama_lora.train.memory import gradient_checkpointing, tiled_mlp
from llama_lora.train.memory.out_of_memory import Gradients
from llama_lora.train.plan import forecast, memory_plan, time_estimate

TRIES = 3  # of the search for the longest context
NEAR = 0.05  # between the longest that fits and the shortest that does not


class Ours(Contender):
    """Trains as train_lora.py does, without what logs and saves."""

    def load(self):
        row, task = self.task.first, self.task
        where = task.dtype, self.card.device
        return adapted(task.folder, task.quantization, *where, row.rank, row.targets, DROPOUT)

    def checks(self) -> dict[str, str]:
        """Those of the Trainer before its first step."""
        base = self.model.get_base_model()
        with autocast(self.card.device, self.task.dtype):
            return {
                "packed examples are kept apart": outcome(packing.check_isolation, base),
                "the loss in chunks is the model's own": outcome(chunked_loss.check, base),
            }

    def measure(self, row: Row) -> Iterator[dict]:
        with kernel(row):
            yield from self.longest(row) if row.measures == "context" else self.speed(row)

    # ---- Speed and memory ----

    def speed(self, row: Row) -> Iterator[dict]:
        pieces = self.pieces(row)
        training = MicroBatches(pieces, row.length, row.batch)
        kernel = self.attention(row)
        room = {of.__name__: training.most(partial(of, kernel)) for of in (log_sums, sum_rows)}
        setup = self.setup(row, training.fullest, max(pieces.lengths), **room)
        autos = {"parts": row.recompute == "auto", "offload": self.card.cuda}
        autos = {name for name in autos if autos[name]}
        planned = forecast.choose(setup, self.card.limit, autos, self.planners_speed())
        run = Run(self, row, planned.setup.part_tokens, planned.setup.parts)
        clock = Clock(self.card, self.task.steps)
        while clock.goes_on():
            run.step(training[clock.timed + 1])
            clock.tick()
        timed = np.concatenate(training.members[1 : clock.timed + 1])
        done = training.lengths[timed].sum() / training.lengths.sum()
        found = self.found(clock, pieces, float(done)) | run.account(setup)
        found |= {"planned": planned.total, "planned_recomputed": planned.recomputed}
        learned = lengths.Pieces(pieces[i] for i in timed).labelled
        work = time_estimate.EpochWork.of(training.lengths[timed], learned)
        share = found["recomputed"] / found["layers"]
        operations = time_estimate.operations(self.shape, work, setup.lora_parameters, share)
        found["operations_per_second"] = operations / clock.seconds
        parts = clock.timed * found["parts"]
        found["assumed_share"] = self.assumed_share(operations, parts, share)
        yield found
        if row.profiled and found["seconds_per_step"] < ENOUGH:
            yield found | profile(lambda: run.step(training[1]), self.card)

    def assumed_share(self, operations: float, parts: int, recomputed: float) -> float:
        """The share of the rate of products that the planner expects of a training."""
        speed = self.planners_speed()
        seconds = operations / (speed.rate * time_estimate.EFFICIENCY)
        seconds += time_estimate.dequantizing_seconds(self.shape, parts, recomputed, speed.weights)
        return operations / speed.rate / seconds

    def planners_speed(self) -> time_estimate.Speed:
        device = "cuda" if self.card.cuda else "cpu"
        given = self.shape, self.task.quantization, self.task.dtype, device
        return time_estimate.measured_speed(*given)

    def setup(self, row: Row, tokens: int, longest: int, **more) -> memory_plan.Setup:
        """What the planner is asked about a row."""
        host = {} if self.card.cuda else {"on_card": False, "base_load": self.card.before}
        return memory_plan.Setup(
            shape=self.shape,
            quantization=self.task.quantization,
            itemsize=self.task.dtype.itemsize,
            targets=self.shape.targets(list(row.targets)),
            lora_r=row.rank,
            lora_dropout=DROPOUT,
            use_dora=False,
            optim=row.optim,
            tokens=tokens,
            longest=longest,
            attention=self.attention(row),
            recompute=row.recompute,
            **host,
            **more,
        )

    def attention(self, row: Row) -> str:
        """The kernel that the row asks for, or this device has."""
        if asked := asked_for(row):
            return asked
        capability = torch.cuda.get_device_capability() if self.card.cuda else None
        return forecast.kernel_of(self.shape, self.task.dtype, capability)

    # ---- The longest context ----

    def longest(self, row: Row) -> Iterator[dict]:
        """One example alone, ever longer; what fits is told as soon as it is known."""
        grain = max(16, 256 // self.task.scale)
        best, fails, self.lacking = {"tokens": 0}, None, ""
        tokens = self.planned_longest(row, grain)
        for _ in range(TRIES):
            found = self.try_context(row, tokens)
            best, fails = (found, fails) if found else (best, tokens)
            tokens = next_try(best["tokens"], fails, row.length, grain)
            if tokens is None:
                break
            if found:
                yield found | {"fails_at": fails, "status": SEARCHING}
        if not best["tokens"]:
            raise torch.OutOfMemoryError(f"{self.lacking} at one example of {fails:,} tokens")
        yield best | {"fails_at": fails, "lacking": self.lacking}

    def planned_longest(self, row: Row, grain: int) -> int:
        """Tokens that the planner says fit."""

        def spare(tokens: int) -> bool:
            return memory_plan.plan(self.long_setup(row, tokens), self.card.limit).fits

        low, high = 1, row.length // grain
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if spare(middle * grain) else (low, middle - 1)
        return low * grain

    def long_setup(self, row: Row, tokens: int) -> memory_plan.Setup:
        return self.setup(row, tokens, tokens, offload=self.card.cuda)

    def try_context(self, row: Row, tokens: int) -> dict | None:
        """The figures of a step with one example of so many tokens; None if it does not fit."""
        set_back(self.model.get_base_model())
        self.card.start()
        draw = np.random.default_rng(tokens)
        words = self.shape.config.vocab_size
        labelled = round(tokens * lengths.labelled_share())
        try:
            run = Run(self, row, tokens, parts=1, offload="True")
            run.step([lengths.piece(16, 8, words, draw)])  # makes the optimizer's states
            began = time.perf_counter()
            run.step([lengths.piece(tokens, labelled, words, draw)])
            self.card.wait()
            seconds = time.perf_counter() - began
            self.card.check()
        except (RuntimeError, InputError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            host = isinstance(error, InputError) or not self.card.cuda
            self.lacking = "memory of the host" if host else "memory of the card"
            return None
        return {
            "tokens": tokens,
            "whole_conversations": lengths.within(tokens),
            "seconds_per_step": seconds,
            "tokens_per_second": tokens / seconds,
            **self.card.peak(),
            **run.account(self.long_setup(row, tokens)),
        }


def next_try(fits: int, fails: int | None, most: int, grain: int) -> int | None:
    """The next length to try, given the longest that fits and the shortest that does not."""
    if fails is None:
        tokens = min(most, fits * 5 // 4)
    elif not fits:
        tokens = fails * 4 // 5
    elif fails - fits <= max(grain, NEAR * fits):
        return None
    else:
        tokens = (fits + fails) // 2
    tokens = tokens // grain * grain
    return tokens if tokens > fits else None


class Run:
    """The training of one row: its memory set up, and an optimizer of its own."""

    def __init__(self, ours: Ours, row: Row, tokens: int, parts: int, offload: str = "auto"):
        self.model, self.device, self.dtype = ours.model, ours.card.device, ours.task.dtype
        base = self.model.get_base_model()
        set_back(base)
        optim, trained = OptimizerNames(row.optim).value, trainable(self.model)
        reserved = preparation.bytes_to_come(optim, trained)
        with autocast(self.device, self.dtype):
            told = gradient_checkpointing.set_up(
                base, row.recompute, tokens, offload, reserved=reserved
            )
        self.told = [told]
        self.optimization = Optimization(self.model, row.optim, self.dtype, self.device)
        self.gradients = Gradients(self.optimization.parameters, self.told.append, parts)

    def step(self, examples: list) -> None:
        """As `LoraTrainer.training_step`, and the optimizer's step after it."""
        self.model.train()
        batch = on_device(examples, self.device)
        count = (batch["labels"] != IGNORE).sum()

        def loss_of(part: dict) -> torch.Tensor:
            with autocast(self.device, self.dtype):
                return self.model(**part, num_items_in_batch=count).loss

        scale = self.optimization.scaler.get_scale()
        self.loss, gradients = self.gradients.compute(loss_of, batch, scale)
        self.optimization.step(self.gradients.as_loss(gradients))

    def account(self, setup: memory_plan.Setup) -> dict:
        """How it was computed, and what the planner says that takes."""
        layers = self.model.get_base_model().base_model.layers
        count = sum(layer.gradient_checkpointing for layer in layers)
        setup = replace(setup, parts=self.gradients.parts, offload="host" in self.told[0])
        parts = memory_plan.memory(setup, count)
        return {
            "loss": self.loss.item(),
            "recomputed": count,
            "layers": len(layers),
            "parts": self.gradients.parts,
            "set_up": self.told,
            "planned": sum(parts.values()),
            "planned_as_set_up": parts,
        }


def adapted(folder: Path, quantization: str, dtype, device, rank: int, targets, dropout: float):
    """A base with LoRA matrices, as train_lora.py loads it."""
    lora = SimpleNamespace(
        lora_r=rank,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        lora_target_modules=list(targets),
        use_dora=False,
        use_rslora=False,
    )
    args = SimpleNamespace(compute_dtype=dtype, device=device, seed=0, learning_rate=LEARNING_RATE)
    return lora_model.load(str(folder), quantization, lora, args)


def on_device(examples: list, device: torch.device) -> dict:
    """A micro-batch as the model takes it."""
    batch = collate([examples])
    del batch["names"]
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def set_back(base) -> None:
    """Undo what `set_up` did for the row before, and let go of its memory on the host."""
    gradient_checkpointing.checkpoint(base, [])
    tiled_mlp.undo(base.base_model.layers)
    for layer in base.base_model.layers:
        layer.__dict__.pop("_gradient_checkpointing_func", None)
    if torch.cuda.is_available():
        torch._C._host_emptyCache()


def asked_for(row: Row) -> str | None:
    """The kernel that a row asks for, where there is a card."""
    if row.kernel == "any" or not torch.cuda.is_available():
        return None
    return EFFICIENT if row.kernel == "memory-efficient" else LOOP


@contextmanager
def kernel(row: Row):
    """Attention has the kernel that the row asks for."""
    with ExitStack() as undone:
        if asked := asked_for(row):
            undone.enter_context(attention_kernels.only(asked))
            undone.callback(cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled())
            cuda.enable_cudnn_sdp(row.kernel == "cuDNN")
        yield


def outcome(check: Callable, model) -> str:
    try:
        check(model)
    except InputError as error:
        return str(error)
    return "holds"
