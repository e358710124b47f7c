"""The C library's allocator, from which a training without a card has its activations."""

import ctypes
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
