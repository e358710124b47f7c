"""The allocators that activations come from: CUDA's of torch, or without a card the C library's."""

import ctypes
import os
import platform

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
LARGE = 1 << 20  # bytes


def give_back_large_blocks() -> None:
    """Let the system have large blocks back as soon as they are freed.

    glibc raises the bound for that to 32 MiB by itself, and where layers recompute, the holes in
    its heap come to several times what is held. New blocks cost page faults instead.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGE)
        libc.malloc_trim(0)  # of what is free by now


def expect_all_sizes() -> None:
    """Let CUDA's blocks grow instead of laying aside one of each size; before the first of them.

    Micro-batches have hardly ever the same number of tokens, and blocks of one serve no other.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
