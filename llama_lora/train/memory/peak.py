"""The most memory that this process has held."""

import re
from pathlib import Path

import torch


def peak_memory() -> int:
    """The most bytes this process has held, of the card's memory or, without a card, the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    # Not `ru_maxrss`, which begins with the memory of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) << 10
