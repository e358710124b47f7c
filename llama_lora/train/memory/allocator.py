"""The C library's allocator, which has the activations where there is no card."""

import contextlib
import ctypes
import platform

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
LARGE = 1 << 20  # bytes
RAISED = 32 << 20  # bytes: glibc raises the bound to this by itself

# How much glibc's heap keeps as holes, as a share of what comes and goes on a CPU, by bytes per
# element: in 16 bits, oneDNN's products lie between the blocks. From
# benchmarks.training.plan_accuracy.
HOLES = {2: 0.65, 4: 0.4}

_bound = RAISED  # of large blocks: glibc lets it be set, but not read


def give_back_large_blocks() -> None:
    """From now on, return large blocks to the system as soon as they are freed.

    glibc raises the bound for that to 32 MiB by itself. If layers recompute, the holes in its heap
    then grow to several times what is held. The price of returning blocks is page faults.
    """
    global _bound
    _bound = LARGE
    _tell_glibc(_bound)


@contextlib.contextmanager
def large_blocks_given_back():
    """The same within a context: without a backward pass, the holes are just as large."""
    _tell_glibc(LARGE)
    try:
        yield
    finally:
        _tell_glibc(_bound)


def _tell_glibc(bound: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, bound)
        libc.malloc_trim(0)  # of what is already free
