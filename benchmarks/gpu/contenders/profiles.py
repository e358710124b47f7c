"""Where the time of a step goes, as torch's profiler sees it."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

from benchmarks import operators

# CUDA's calls, by the beginnings of their names.
LAUNCHES = "cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"
WAITS = "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"


def profile(step: Callable, card) -> dict:
    """The operators that a step spends most of the device's time in themselves.

    Each of `operators` is its name, calls, and seconds; kernels count for the operator that started
    them. `launches` are the kernels started, and `waits` how often the host waited for the card.
    `busy` is the share of the step in which the device computes; None without a card.
    """
    nothing, _ = profiled(lambda: None, card)
    seen, seconds = profiled(step, card)
    longest, total = operators.longest(seen)
    return {
        "operators": longest,
        "profiled_seconds": total,
        "busy": total / seconds if card.cuda else None,
        "launches": called(seen, LAUNCHES),
        "waits": called(seen, WAITS) - called(nothing, WAITS),  # but for those of the profile
    }


def profiled(step: Callable, card) -> tuple[torch.profiler.profile, float]:
    """A profile of `step`, and the seconds that it took."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * card.cuda
    card.wait()
    with torch.profiler.profile(activities=activities) as seen:
        began = time.perf_counter()
        step()
        card.wait()
        seconds = time.perf_counter() - began
    return seen, seconds


def called(seen: torch.profiler.profile, names: tuple[str, ...]) -> int:
    """How often functions with these beginnings of names were called."""
    return sum(event.name.startswith(names) for event in seen.events())
