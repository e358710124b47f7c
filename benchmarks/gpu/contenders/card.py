"""A card with less memory than the one that is here, and what a process takes of it."""

import gc
from pathlib import Path

import psutil
import torch

from llama_lora.hardware.cards import GIB

SPARE = 128 << 20  # bytes of the card for the kernels that CUDA loads when they are first called


class SmallCard:
    """The CUDA device, held to `gib` GiB with what CUDA itself takes; without one, the host.

    Within its context the process sees a card of that size: what it may allocate and what is said
    to be free. On a CPU nothing can be held back, so that `check` raises when it was too much.
    """

    def __init__(self, gib: float):
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.before = 0 if self.cuda else psutil.Process().memory_info().rss
        self.limit = round(gib * GIB)
        self._whole_card = torch.cuda.mem_get_info

    def __enter__(self):
        if self.cuda:
            self.limit = min(self.limit, self._whole_card()[1] - SPARE)
            torch.cuda.mem_get_info = self._free_and_total
        self.start()
        return self

    def __exit__(self, *_):
        torch.cuda.mem_get_info = self._whole_card
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def start(self) -> None:
        """Let go of what is not in use, and measure the peak from here on."""
        gc.collect()
        if not self.cuda:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _, total = self._whole_card()
        share = (self.limit - self.context()) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def context(self) -> int:
        """Bytes that CUDA, its libraries and whoever else is on the card take beside torch."""
        free, total = self._whole_card()
        return total - free - torch.cuda.memory_reserved()

    def peak(self) -> dict[str, int]:
        """Most bytes taken since `start`: in all, of them by tensors, and by CUDA itself."""
        if not self.cuda:
            return {"peak": _resident_peak(), "allocated": _resident_peak() - self.before}
        context = self.context()
        return {
            "peak": torch.cuda.max_memory_reserved() + context,
            "allocated": torch.cuda.max_memory_allocated(),
            "context": context,
        }

    def wait(self) -> None:
        """For the device to have computed all that it was asked to."""
        if self.cuda:
            torch.cuda.synchronize()

    def check(self) -> None:
        """Raise `torch.OutOfMemoryError` where more was taken than there is."""
        if not self.cuda and _resident_peak() > self.limit:
            raise torch.OutOfMemoryError(f"more than {self.limit / GIB:.2f} GiB are resident")

    def _free_and_total(self, device=None) -> tuple[int, int]:
        """`torch.cuda.mem_get_info` as the small card has it."""
        free, total = self._whole_card()
        return max(0, free - max(0, total - self.limit)), min(total, self.limit)


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
