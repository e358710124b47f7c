"""How long will it take? The operations of an epoch, divided by the rate of the device.

A quantized base also has its weights dequantized in each pass, whatever the number of tokens.
"""

import functools
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from llama_lora.model import int8_linear
from llama_lora.model.folder.shape import Shape, head_size
from llama_lora.train.compute.attention_kernels import LOOP
from llama_lora.train.compute.packed_attention import BLOCK

# The share that training reaches of the rate of matrix products. Assumed, based on the shares in
# docs/training-speed.md.
EFFICIENCY = 0.5
# Assumed: seconds of a kernel in which nothing is computed. From benchmarks.training.launches:
# how many of them a layer starts for a part, and how much more if it recomputes.
LAUNCH, LAUNCHES, AGAIN = 5e-6, 130, 0.4
CODE_BYTES = {"8bit": 1, "4bit": 0.5}  # of a weight
PROBE_SECONDS = 0.5
PROBE_TOKENS = 1024


@dataclass(frozen=True)
class EpochWork:
    """What an epoch consists of: tokens, labelled tokens, and pairs of tokens that attend.

    `attended` is the sum of the squares of the examples' lengths; with windows, the mean over the
    layers of an equally expensive number.
    """

    tokens: int
    labelled: int
    attended: int

    @classmethod
    def of(
        cls, lengths: np.ndarray, labelled: int, windows=(None,), kernel: str = LOOP
    ) -> "EpochWork":
        """From the examples' lengths, and the window of each layer (`attention_check.windows`).

        Args:
            kernel: of attention; `LOOP` computes what a window hides from a block of queries.
        """
        lengths = lengths.astype(np.int64)
        layers, block = Counter(windows), BLOCK if kernel == LOOP else 0
        attended = sum(
            count * attended_in(lengths, window, block) for window, count in layers.items()
        )
        return cls(int(lengths.sum()), labelled, attended // layers.total())


def attended_in(lengths: np.ndarray, window: int | None, block: int) -> int:
    """The sum of squares; beyond a window what costs as much: blocks are masked, not halved.

    Args:
        block: queries that are masked together.
    """
    plain = lengths if window is None else np.minimum(lengths, window)
    behind = lengths - plain
    return int((plain**2 + 2 * behind * ((window or 0) + np.minimum(behind, block))).sum())


@dataclass(frozen=True)
class Speed:
    """How fast a device trains.

    Attributes:
        rate: operations per second in matrix products; `source` says where it is from.
        weights: per second that are dequantized; None if the base is not quantized.
        launch: seconds that a kernel takes besides.
    """

    rate: float
    source: str
    weights: float | None
    launch: float = 0.0

    def computing(self, plan, work: EpochWork) -> float:
        """Seconds of the operations; `plan` is a `memory_plan.Plan`."""
        setup = plan.setup
        needed = operations(setup.shape, work, setup.lora_parameters, plan.share)
        return needed / (self.rate * EFFICIENCY)

    def dequantizing(self, plan, micro_batches: float) -> float:
        """Seconds in which so many micro-batches dequantize weights."""
        parts = micro_batches * plan.setup.parts
        return dequantizing_seconds(plan.setup.shape, parts, plan.share, self.weights)

    def of_a_micro_batch(self, plan) -> float:
        """Seconds of the fullest, with examples as long as the longest."""
        setup = plan.setup
        work = EpochWork(setup.tokens, 0, setup.tokens * setup.longest)
        launches = setup.parts * setup.shape.layers * LAUNCHES * (1 + AGAIN * plan.share)
        return self.computing(plan, work) + self.dequantizing(plan, 1) + launches * self.launch


def operations(shape: Shape, work: EpochWork, lora_parameters: int, recomputed: float) -> float:
    """Floating-point operations of an epoch; `recomputed` is the share of layers that recompute.

    Per token, a weight costs 2 forward, and backward 2 if it is frozen or 4 if it is trained; the
    head is computed for labelled tokens only. Attention is causal, and its backward pass recomputes
    it (Dao et al. 2022), so that it costs 2.5 times the forward pass.
    """
    config = shape.config
    size = config.num_attention_heads * head_size(config)
    forward = 2 * (shape.linear + lora_parameters) * work.tokens
    attention = 2 * shape.layers * size * work.attended
    backward = 2 * (shape.linear + 2 * lora_parameters) * work.tokens + 2.5 * attention
    head = 4 * shape.head * work.labelled
    return (1 + recomputed) * (forward + attention) + backward + head


def measured_speed(shape: Shape, quantization: str, dtype, device: str) -> Speed:
    """That of this machine's device."""
    return Speed(
        measured_rate(shape, dtype, device),
        "its matrix products, measured now",
        measured_dequantizing_rate(shape, quantization, dtype, device),
        LAUNCH if device == "cuda" else 0.0,
    )


def measured_rate(shape: Shape, dtype, device: str) -> float:
    """Operations per second in products of a token block with the base's largest linear layer."""
    return _rate_of_products(*_largest(shape), dtype, device)


def dequantizing_seconds(shape: Shape, parts: float, recomputed: float, rate: float | None):
    """Seconds in which so many micro-batches, or parts of them, dequantize weights.

    Each weight forward, backward, and where a layer recomputes; `rate` in weights per second, None
    for a base that is not quantized.
    """
    return parts * (2 + recomputed) * shape.linear / rate if rate else 0.0


def dequantizing_rate(bandwidth: float, quantization: str, itemsize: int) -> float | None:
    """Weights per second that memory of `bandwidth` (bytes per second) lets through at best."""
    return None if quantization == "none" else bandwidth / (CODE_BYTES[quantization] + itemsize)


def measured_dequantizing_rate(shape: Shape, quantization: str, dtype, device) -> float | None:
    """Weights per second of the base's largest linear layer that are dequantized here."""
    if quantization == "none":
        return None
    return _rate_of_dequantizing(*_largest(shape), quantization, dtype, device)


def _largest(shape: Shape) -> tuple[int, int]:
    """Outputs and inputs of the largest linear layer."""
    return max(shape.linears.values(), key=lambda size: size[0] * size[1])


@functools.cache
def _rate_of_products(outputs: int, inputs: int, dtype, device: str) -> float:
    import torch

    left = torch.randn(PROBE_TOKENS, inputs, device=device).to(dtype)
    right = torch.randn(inputs, outputs, device=device).to(dtype)
    return 2 * PROBE_TOKENS * inputs * outputs / _seconds(lambda: left @ right, device)


@functools.cache
def _rate_of_dequantizing(outputs, inputs, quantization: str, dtype, device: str) -> float:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(outputs, inputs, device=device).half()
    if quantization == "8bit":
        codes, scales, _ = int8_linear.quantize(weight)
        seconds = _seconds(lambda: int8_linear.dequantized(codes, scales[:, None], dtype), device)
    else:
        settings = {"quant_type": "nf4", "compress_statistics": True}
        codes, state = quantize_4bit(weight.to(dtype), **settings)
        seconds = _seconds(lambda: dequantize_4bit(codes, state), device)
    return weight.numel() / seconds


def _seconds(compute, device: str) -> float:
    """The least time that it takes, on average of a few in a row."""
    import torch

    least, ends = float("inf"), time.monotonic() + PROBE_SECONDS
    while least == float("inf") or time.monotonic() < ends:
        started = time.perf_counter()
        for _ in range(4):
            compute()
        if device == "cuda":
            torch.cuda.synchronize()
        least = min(least, (time.perf_counter() - started) / 4)
    return least
