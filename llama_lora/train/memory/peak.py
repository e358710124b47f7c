"""The most memory that training has taken."""

import re
from pathlib import Path

import torch


def peak_memory() -> int:
    """The most bytes taken: of the card's memory or, without a card, by this process.

    Of a card, with what torch does not see and the memory plan counts, too: CUDA's context, kernels
    and libraries. The driver tells it for all processes together, so whoever else uses the card is
    in it. (What it tells of single ones is hidden from processes in containers.)
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()
    # Not `ru_maxrss`, which begins with the memory of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) << 10
