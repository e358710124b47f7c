"""The operators that run: those that a profile says most time is spent in, and how many."""

from collections import Counter

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = 12
VIEWS = "aten::_unsafe_view", "aten::_reshape_alias"  # besides those that torch calls views
COPIES = "aten::cat", "aten::clone", "aten::copy_", "aten::index_copy_"


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


class Counted(TorchDispatchMode):
    """Counts the operators that run under it by `names`, and the bytes that they have `copied`.

    Views are not counted. Operators made of others, which torch leaves whole in inference mode, are
    counted as these.
    """

    def __init__(self):
        super().__init__()
        self.names, self.copied = Counter(), 0

    def times(self, name: str, args: tuple) -> int:
        """How often an operator counts."""
        return 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            parts = function.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = function(*args, **kwargs)
        name = function.name().partition(".")[0]
        if not (function.is_view or name in VIEWS):
            self.names[name] += self.times(name, args)
        if name in COPIES:
            self.copied += result.numel() * result.itemsize
        return result
