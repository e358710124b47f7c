"""The most memory that this process has held."""

import re
from pathlib import Path

import torch


def peak_memory() -> int:
    """Most bytes this process held so far: of the card's memory, or without one of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    # Not `ru_maxrss`, which begins with what the process held that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) << 10
