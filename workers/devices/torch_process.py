"""A process that loads PyTorch: how much memory it has, how it returns what is freed, and how it exits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

# Of malloc.h: allocations from the first on are mappings of their own; free bytes at the heap's end.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
JOB_MAPPED = 4 * 2**20  # below, many short-lived tensors would cost page faults
JOB_FREE = 64 * 2**20
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # of PyTorch's environment
LOADING_MAPPED = 2**20
SERVING_MAPPED = 32 * 2**20  # the most that glibc would choose itself: reuse is faster while serving
STATUS_KIB = 1024  # the kernel counts in these


def status_bytes(field: str) -> int:
    """A size from the kernel's account of this process; getrusage's peak has the parent's memory in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * STATUS_KIB


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is one whose allocator can be set."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def use_huge_pages() -> None:
    """Let PyTorch ask for huge pages for tensors of 2 MiB and more; to be called before it is loaded.

    Most of a job's tensors are mappings of their own, whose pages the kernel clears one by one: a fifth of
    the processor time of calibrating SmolLM2.
    """
    os.environ.setdefault(HUGE_PAGES, "1")


def return_freed_memory() -> None:
    """From now on a job's tensors go back to the system when they are freed.

    glibc raises the size from which an allocation is a mapping of its own to that of the largest freed so
    far, up to 32 MiB. Most tensors of a layer then lie in its heap, freed ones leave gaps that fit nothing
    that comes later, and the process grows from layer to layer: from 2.3 to 2.7 GiB over 15 layers of
    TinyLlama-1.1B's shape.
    """
    libc = glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, JOB_MAPPED)
        libc.mallopt(M_TRIM_THRESHOLD, JOB_FREE)


@contextlib.contextmanager
def returned_at_once() -> Iterator[None]:
    """Memory that is freed inside, while a model is loaded, goes back to the system at once.

    Loading allocates what stays between what goes: without this it took 1.6 times the packed size, with it
    1.2.
    """
    libc = glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LOADING_MAPPED)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, SERVING_MAPPED)
        libc.malloc_trim(0)


def leave(code: int) -> NoReturn:
    """End this process with what it said: to take down what libraries have loaded takes up to a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
