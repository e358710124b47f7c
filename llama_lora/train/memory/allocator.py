"""The allocators that activations come from: CUDA's of torch, or without a card the C library's."""

import contextlib
import ctypes
import os
import platform

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
LARGE = 1 << 20  # bytes
RAISED = 32 << 20  # bytes: to where glibc raises the bound by itself

# Of what comes and goes on a CPU, the share that glibc's heap keeps besides as holes, by bytes of a
# number: in 16 bits oneDNN's products lie between the blocks. By benchmarks.training.plan_accuracy.
HOLES = {2: 0.65, 4: 0.4}

_bound = RAISED  # of the large blocks: glibc can be told, but not asked


def give_back_large_blocks() -> None:
    """Let the system have large blocks back as soon as they are freed, from now on.

    glibc raises the bound for that to 32 MiB by itself, and where layers recompute, the holes in
    its heap come to several times what is held. New blocks cost page faults instead.
    """
    global _bound
    _bound = LARGE
    _tell_glibc(_bound)


@contextlib.contextmanager
def large_blocks_given_back():
    """The same meanwhile: where nothing is kept for a backward pass, the holes are as large."""
    _tell_glibc(LARGE)
    try:
        yield
    finally:
        _tell_glibc(_bound)


def _tell_glibc(bound: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, bound)
        libc.malloc_trim(0)  # of what is free by now


def expect_all_sizes() -> None:
    """Let CUDA's blocks grow instead of laying aside one of each size; before the first of them.

    Micro-batches have hardly ever the same number of tokens, and blocks of one serve no other.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
