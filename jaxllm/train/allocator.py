"""glibc's malloc, told to keep what a step frees for the next one."""

import ctypes
import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from jaxllm.train.gpus import has_gpu

# glibc's malloc.h, and Linux's mman.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
MADV_HUGEPAGE = 14
HUGE_PAGE_BYTES = 2 << 20

MOST = 1 / 3
"""Of the memory that this process may have, that it holds without giving any back."""

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")

_kept: list[ctypes.CDLL] = []


def keep_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Lets this process keep freed memory, in huge pages; returns whether it does.

    On a CPU a step's temporary memory comes from malloc, which gives arrays this large
    back to the system when the step ends, and the next step faults them in again, page
    by page. Kept, they are there. The price is a larger process, which `tend` bounds.

    To be called before JAX starts its threads, since one heap serves them all. Does
    nothing where there is a GPU to be used, whose memory XLA keeps itself, without
    glibc, or where the user tunes malloc (GLIBC_TUNABLES, MALLOC_*).
    """
    tuned = any(n == "GLIBC_TUNABLES" or n.startswith("MALLOC_") for n in environment)
    if tuned or platform.libc_ver()[0] != "glibc" or has_gpu(environment):
        return False
    libc = ctypes.CDLL(None)
    kept = _tune(
        libc,
        {
            M_MMAP_MAX: 0,  # nothing outside the heap, which alone is kept,
            M_TRIM_THRESHOLD: -1,  # and never made smaller;
            M_ARENA_MAX: 1,  # a thread's own heap ends at 64 MB
        },
    )
    if kept:
        _ask_for_huge_pages(libc)
        _kept.append(libc)
    return kept


def tend() -> None:
    """Gives back what is free once the process holds more than MOST; where what is not
    free is more than that, memory is no longer kept: such a run could not afford it.

    For now and then; does nothing unless memory is kept.
    """
    if not _kept or resident_bytes() <= (most := MOST * memory_bytes()):
        return
    libc = _kept[0]
    libc.malloc_trim(0)
    if resident_bytes() > most:
        # What malloc arrives at by itself where large arrays come and go.
        _tune(libc, {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20,
                     M_TRIM_THRESHOLD: 64 << 20})  # fmt: skip
        _kept.clear()


def resident_bytes() -> int:
    """The memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def memory_bytes() -> int:
    """The memory that this process may hold: the machine's, or its control group's."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:
        number, controllers, path = group.split(":", 2)
        below = "" if number == "0" else controllers
        name = "memory.max" if number == "0" else "memory.limit_in_bytes"
        for place in (path.strip("/"), ""):
            limit = Path("/sys/fs/cgroup", below, place, name)
            try:
                sizes.append(int(limit.read_text()))
            except (OSError, ValueError):  # no such controller, or "max"
                continue
    return min(sizes)


def _tune(libc: ctypes.CDLL, options: dict[int, int]) -> bool:
    libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    return all([libc.mallopt(option, value) for option, value in options.items()])


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Asks for huge pages in what the heap will grow into: half as much as there is.
    Nothing of it is taken yet. Where the system says no, pages stay small."""
    if _counts_promises():
        return
    size = memory_bytes() // 2
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):
        start = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        whole = (block + size - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        libc.madvise(start, whole, MADV_HUGEPAGE)
        libc.free(block)


def _counts_promises() -> bool:
    """Whether memory counts from when it is asked for, not from when it is used."""
    try:
        return OVERCOMMIT.read_text().strip() == "2"
    except OSError:
        return True
