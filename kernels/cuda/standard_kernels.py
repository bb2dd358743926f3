"""The kernels that most jobs and servers use, compiled ahead: a first start then finds them in the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from typing import NamedTuple

import torch

from kernels.cuda import decode, wide
from kernels.cuda.cubin_cache import CubinCache
from kernels.cuda.decode import Device, format_defines
from kernels.cuda.layout import Format
from kernels.cuda.linear import DECODE_TOKENS, LOADED_TOKENS, RECORD_SOURCE

Source = tuple[str, dict[str, int]]  # a file of csrc/cuda, and its macros


class CompiledKernel(NamedTuple):
    """A kernel that is in the cache now: its source, the seconds that took, the how-manieth of how many."""

    architecture: str
    source: str
    seconds: float
    done: int
    of: int


# Processors and shared bytes of a block, which decide on shapes: A100, H100, B200, RTX PRO 6000.
DEVICES = {
    "sm_80": Device(108, 166912), "sm_90a": Device(132, 232448), "sm_100": Device(148, 232448),
    "sm_120": Device(188, 101376),
}  # fmt: skip
FORMS = tuple(Format(4, 128, asymmetric, torch.bfloat16) for asymmetric in (False, True))
# Channels and rows of models of 8B and 70B.
SIZES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672), (28672, 8192))
DTYPE = torch.bfloat16


def standard_kernels(architecture: str) -> Iterator[Source]:
    """Those of the search, and of W4 g128 in bfloat16 for the sizes of usual models; each once."""
    yield "search.cu", {}
    seen: list[Source] = []
    for form in FORMS:
        seen.append((RECORD_SOURCE, format_defines(form, torch.float16)))
        for tokens, (channels, rows) in product(LOADED_TOKENS, SIZES):
            kernel = linear_kernel(architecture, tokens, rows, channels, form)
            if kernel is not None and kernel not in seen:
                seen.append(kernel)
    yield from seen


def linear_kernel(architecture: str, tokens: int, rows: int, channels: int, form: Format) -> Source | None:
    """The kernel of a product; None where the weight is dequantized for PyTorch's."""
    device = DEVICES[architecture]
    if architecture == "sm_90a" and tokens > DECODE_TOKENS:
        return wide.SOURCE, wide.make_plan(tokens, rows, channels, form, device).shape.defines(form, DTYPE)
    if tokens > decode.MAX_TOKENS:
        return None
    return decode.SOURCE, decode.make_plan(tokens, rows, channels, form, device).shape.defines(form, DTYPE)


def compile_each(architecture: str, cache: CubinCache, threads: int) -> Iterator[CompiledKernel]:
    """Fill the cache with the kernels of an architecture: each as it is ready. Raises CompileError."""

    def compiled(kernel: Source) -> tuple[str, float]:
        began = time.monotonic()
        cache.get(kernel[0], architecture, kernel[1])
        return kernel[0], time.monotonic() - began

    kernels = list(standard_kernels(architecture))
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(compiled, kernel) for kernel in kernels]
        try:
            for done, future in enumerate(as_completed(running), 1):
                yield CompiledKernel(architecture, *future.result(), done, len(kernels))
        finally:
            for future in running:  # after a fault the others are not worth the wait
                future.cancel()
