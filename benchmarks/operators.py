"""The operators that a profile says most time is spent in."""

import torch
from torch.autograd import DeviceType

OPERATORS = 12


def longest(profile: torch.profiler.profile) -> tuple[list[tuple[str, int, float]], float]:
    """Name, calls and seconds of the longest operators by themselves, and seconds of them all.

    With a CUDA card the time is the card's. A profile of it lists the same time twice, for the
    operator and for the kernels that it started: operators are told, kernels are summed.
    """
    card = torch.cuda.is_available()
    own = "self_device_time_total" if card else "self_cpu_time_total"
    averages = profile.key_averages()
    on_host = [one for one in averages if one.device_type == DeviceType.CPU]
    kernels = [
        one for one in averages if one.device_type != DeviceType.CPU and not one.is_user_annotation
    ]
    total = sum(getattr(one, own) for one in (kernels if card else on_host)) / 1e6
    told = [(one.key, one.count, getattr(one, own) / 1e6) for one in on_host]
    return sorted(told, key=lambda one: one[2], reverse=True)[:OPERATORS], total
