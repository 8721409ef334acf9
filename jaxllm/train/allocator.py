"""glibc's malloc, told to keep what a step frees for the next one."""

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path

# glibc's malloc.h, and Linux's mman.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MADV_HUGEPAGE = 14
HUGE_PAGE_BYTES = 2 << 20


def keep_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Lets this process keep freed memory, in huge pages; returns whether it does.

    On a CPU a step's temporary memory comes from malloc, which gives arrays this large
    back to the system when the step ends, and the next step faults them in again, page
    by page: up to a third of its time. Kept, they are there. The price is that the
    process stays as large as it once was.

    To be called before JAX starts its threads, since one heap serves them all. Does
    nothing where there is a GPU to be used, whose memory XLA keeps itself, with another
    allocator, or where the user tunes malloc (GLIBC_TUNABLES, MALLOC_*).
    """
    tuned = any(n == "GLIBC_TUNABLES" or n.startswith("MALLOC_") for n in environment)
    if tuned or platform.libc_ver()[0] != "glibc" or _has_gpu(environment):
        return False
    libc = ctypes.CDLL(None)
    libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    kept = all(
        libc.mallopt(option, value)
        for option, value in (
            (M_MMAP_MAX, 0),  # nothing outside the heap, which alone is kept,
            (M_TRIM_THRESHOLD, -1),  # and never made smaller;
            (M_ARENA_MAX, 1),  # a thread's own heap ends at 64 MB
        )
    )
    if kept:
        _ask_for_huge_pages(libc)
    return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Asks for huge pages in what the heap will grow into: half as much as the machine
    has. Nothing of it is taken yet. Where the system says no, pages stay small."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):
        start = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        whole = (block + size - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        libc.madvise(start, whole, MADV_HUGEPAGE)
        libc.free(block)


def _has_gpu(environment: Mapping[str, str]) -> bool:
    if environment.get("JAX_PLATFORMS", "").lower() == "cpu":
        return False
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))
