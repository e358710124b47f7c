"""How much memory and time a training will take, told before a weight is loaded."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial

import psutil
from transformers.training_args import OptimizerNames

from llama_lora.cli import InputError
from llama_lora.hardware.cards import CARDS, GIB, Card, card_named
from llama_lora.hardware.device import compute_dtype, present, processes_here
from llama_lora.model.folder.shape import Shape, head_size
from llama_lora.train.compute.attention_kernels import kernel_for, log_sums, sum_rows
from llama_lora.train.plan import suggestions, time_estimate
from llama_lora.train.plan.memory_plan import CUDA_AT_START, CUDA_CONTEXT, Plan, Setup, plan
from llama_lora.train.plan.zero_memory import Zero

REACHED = 0.6  # share of a card's published peak and bandwidth: assumed, not measured
ENOUGH_TOKENS = 1024  # in one part, to keep a device busy


@dataclass(frozen=True)
class Forecast:
    """A memory plan, and the time that an epoch takes."""

    plan: Plan
    where: str
    work: time_estimate.EpochWork
    examples: int
    micro_batches: int
    steps_per_epoch: int
    steps: int
    processes: int
    speed: time_estimate.Speed

    @property
    def parts(self) -> int:
        """How many parts a micro-batch is computed in."""
        return self.plan.setup.parts

    @property
    def part_tokens(self) -> int:
        """The most tokens that are computed at once."""
        return self.plan.setup.part_tokens

    @property
    def hours(self) -> float:
        """Hours per epoch."""
        seconds = self.speed.computing(self.plan, self.work)
        return seconds / self.processes / 3600 + self.dequantizing_hours

    @property
    def dequantizing_hours(self) -> float:
        """Hours per epoch in which weights are dequantized."""
        seconds = self.speed.dequantizing(self.plan, self.micro_batches)
        return seconds / self.processes / 3600

    def line(self) -> str:
        """What to expect, on one line."""
        found = self.plan
        parts = f", each micro-batch in {self.parts} parts" if self.parts > 1 else ""
        return (
            f"memory plan: {gib(found.total)} of {gib(found.available)} on {self.where}{parts}; "
            f"about {duration(self.hours)} an epoch"
        )

    def table(self) -> str:
        """The plan, the time and the verdict in lines."""
        rows = [
            f"  {name:<15}{gib(size):>10}  {note}".rstrip() for name, size, note in self._rows()
        ]
        return "\n".join(
            [
                f"memory plan: a base of {self.plan.setup.shape.parameters / 1e6:,.1f} M "
                f"parameters on {self.where}",
                *rows,
                f"  {'total':<15}{gib(self.plan.total):>10}  of {gib(self.plan.available)}",
                *self._time(),
                self.verdict(),
            ]
        )

    def _rows(self):
        found, setup, shape = self.plan, self.plan.setup, self.plan.setup.shape
        dtype = {4: "fp32", 2: "16 bits"}[setup.itemsize]
        bits = {"8bit": "8 bits", "4bit": "4 bits", "none": dtype}[setup.quantization]
        linear = shape.quantized / 1e6
        other = shape.parameters / 1e6 - linear
        parts = f" in {setup.parts} parts of at most" if setup.parts > 1 else " of"
        offloaded = ", with their inputs on the host" if setup.offload else ""
        tiles = f", MLPs in {setup.tiles} tiles" if found.recomputed and setup.tiles > 1 else ""
        notes = {
            "process": "CUDA's own" if setup.on_card else "Python and its libraries",
            "weights": f"{linear:,.1f} M in {bits}, {other:,.1f} M in {dtype}",
            "LoRA matrices": f"{setup.lora_parameters / 1e6:,.2f} M in "
            + (dtype if setup.zero else "fp32"),
            "optimizer": setup.optim + (", with the matrices in fp32" if setup.zero else ""),
            "activations": f"a micro-batch{parts} {setup.part_tokens:,} tokens; "
            f"{found.recomputed} of {shape.layers} layers recompute{offloaded}{tiles}",
        }
        return [(name, size, notes.get(name, "")) for name, size in found.bytes_by_use.items()]

    def _time(self) -> list[str]:
        labelled = self.work.labelled / max(self.work.tokens, 1)
        share = self.dequantizing_hours / self.hours
        dequantizing = f"; {share:.0%} of it to dequantize weights" if share else ""
        several = f" on each of {self.processes} cards" if self.processes > 1 else ""
        return [
            f"an epoch: {self.examples:,} examples, {self.work.tokens:,} tokens "
            f"({labelled:.1%} labelled) in {self.micro_batches:,} micro-batches; "
            f"{self.steps:,} steps in all",
            f"time: about {duration(self.hours)} an epoch, at {time_estimate.EFFICIENCY:.0%} of "
            f"{self.speed.rate / 1e12:.3g} TFLOP/s{several} ({self.speed.source}){dequantizing}",
        ]

    def verdict(self) -> str:
        if self.plan.fits:
            doubt = "" if self.plan.comfortable else "; it may be tight: the plan is an estimate"
            return f"fits, {gib(self.plan.spare)} to spare{doubt}"
        ways = suggestions.ways_to_fit(self.plan.setup, self.plan.available)
        if ways:
            told = [f"  {flags}  (then {gib(found.total)})" for flags, found in ways]
            too_much = f"does not fit: {gib(-self.plan.spare)} too much; it would fit with"
            return "\n".join([too_much, *told])
        least = suggestions.least(self.plan.setup)
        cards = [card.name for card in CARDS.values() if (card.memory or 0) >= least]
        larger = f", such as {cards[0]}" if cards else ""
        return (
            f"does not fit, whatever the flags: it takes {gib(least)} at least; use a smaller "
            f"base, or a card with more memory{larger}"
        )

    def summary(self) -> dict[str, float]:
        """The predictions, to be compared with what is measured."""
        return {
            "memory_bytes": self.plan.total,
            "hours_per_epoch": self.hours,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def check(self) -> None:
        """Raise `InputError`, with the table, if it does not fit."""
        if not self.plan.fits:
            raise InputError(
                f"{self.table()}\nNothing was loaded; --ignore_memory_plan True tries anyway."
            )


def of(shape: Shape, quantization: str, lora, args, training, windows=(None,)) -> Forecast:
    """The forecast of a run: `lora` and `args` are its flags, `training` its micro-batches.

    `windows` are those of the base's layers, from `attention_check.windows`.
    """
    here = args.plan_for is None
    card, processes = (present(), args.world_size) if here else cards_named(args.plan_for)
    dtype = args.compute_dtype if here else compute_dtype(card)
    available, base_load = room(card, here, processes_here())
    on_card = card.memory is not None
    longest = int(training.lengths.max())
    kernel = kernel_of(shape, dtype, card.capability, windows, longest)
    setup = Setup(
        shape=shape,
        quantization=quantization,
        itemsize=dtype.itemsize,
        targets=shape.targets(lora.lora_target_modules),
        lora_r=lora.lora_r,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        optim=OptimizerNames(args.optim).value,
        tokens=training.fullest,
        longest=longest,
        attention=kernel,
        log_sums=training.most(partial(log_sums, kernel)),
        sum_rows=training.most(partial(sum_rows, kernel)),
        recompute=args.recompute,
        offload=args.offload_activations == "True" and on_card,
        mlp_tiles=args.mlp_tiles,
        on_card=on_card,
        base_load=base_load,
        zero=Zero.of(args, dtype.itemsize, processes, shape.config.hidden_size),
    )
    wanted = {"parts": args.in_parts, "offload": args.offload_activations == "auto" and on_card}
    autos = {name for name, holds in wanted.items() if holds}
    speed = speed_of(card, here, shape, quantization, dtype)
    micro_batches = -(-len(training) // processes)
    steps = -(-micro_batches // args.gradient_accumulation_steps)
    return Forecast(
        plan=choose(setup, available, autos, speed),
        where=f"{processes} × {card.shown}" if processes > 1 else card.shown,
        work=time_estimate.EpochWork.of(
            training.lengths, training.examples.labelled(), windows, kernel
        ),
        examples=len(training.examples),
        micro_batches=len(training),
        steps_per_epoch=steps,
        steps=args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs),
        processes=processes,
        speed=speed,
    )


def kernel_of(shape: Shape, dtype, capability, windows=(None,), longest: int = 0) -> str:
    """The kernel of attention; if it depends on the window, that of a layer where one matters."""
    narrow = (window for window in windows if window is not None and window < longest)
    size = head_size(shape.config)
    return kernel_for(dtype, size, capability, window=min(narrow, default=None))


def choose(setup: Setup, available: float, autos: set[str], speed: time_estimate.Speed) -> Plan:
    """The plan to train by.

    Args:
        autos: what may be chosen freely: into how many "parts" to cut a micro-batch, and whether to
            "offload" the layers' inputs to the host.
        speed: of the device.
    """
    if "parts" in autos:
        setup = replace(setup, parts=_parts(setup, available, speed))
    found = plan(setup, available)
    if "offload" in autos and not found.comfortable and found.recomputed == setup.shape.layers:
        found = plan(replace(setup, offload=True), available)
    return found


def _parts(setup: Setup, available: float, speed: time_estimate.Speed) -> int:
    """How many parts to compute a micro-batch in so that it takes the least time.

    More parts let fewer layers recompute, but each of them dequantizes all weights anew.
    """
    fitting, parts = [], 1
    while True:
        found = plan(replace(setup, parts=parts), available)
        small = found.setup.part_tokens <= max(ENOUGH_TOKENS, setup.longest)
        if found.comfortable:
            fitting.append(found)
        if found.setup.part_tokens == setup.longest or (fitting and small):
            return min(fitting or [found], key=speed.of_a_micro_batch).setup.parts
        parts *= 2


def cards_named(text: str) -> tuple[Card, int]:
    """The card that `--plan_for` names, and how many of it: "T4", "2xT4", "16GiB".

    Raises:
        InputError: it is neither a known card nor a size.
    """
    found = re.fullmatch(r"(?:(\d)\s*[x×]\s*)?(.+)", text.strip(), re.IGNORECASE)
    card = card_named(found[2])
    if card.memory is None:
        raise InputError(
            f"--plan_for {text}: expected a card; without the flag, the plan is for this machine"
        )
    return card, int(found[1] or 1)


def room(card: Card, here: bool, processes: int) -> tuple[float, float]:
    """Bytes that a process may take, and how many of them it takes whatever is loaded.

    Args:
        here: whether `card` is this machine's device, whose free memory counts.
        processes: how many share the host's memory, if there is no card.
    """
    if card.memory is None:
        taken = psutil.Process().memory_info().rss
        return psutil.virtual_memory().available / processes + taken, taken
    if not here:
        return card.memory, CUDA_CONTEXT
    import torch

    # The process has some of it already, since it asks.
    return torch.cuda.mem_get_info()[0] + CUDA_AT_START, CUDA_CONTEXT


def speed_of(card: Card, here: bool, shape: Shape, quantization: str, dtype) -> time_estimate.Speed:
    """The speed of the card, which is measured if it is here, and else assumed."""
    on_card = card.memory is not None
    if here:
        device = "cuda" if on_card else "cpu"
        return time_estimate.measured_speed(shape, quantization, dtype, device)
    bandwidth = REACHED * card.bandwidth
    return time_estimate.Speed(
        REACHED * card.peak_flops,
        f"{REACHED:.0%} of its published peak, assumed",
        time_estimate.dequantizing_rate(bandwidth, quantization, dtype.itemsize),
        time_estimate.LAUNCH,
    )


def gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    minutes = round(60 * hours)
    return f"{minutes} minutes" if minutes > 1 else "a minute"
