"""Memory in which blocks leave partial sums and count their arrivals: one for each stream and graph."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from kernels.cuda.driver import current_stream, open_driver

CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


class Workspace:
    """Grows to what is asked for. Counters are zero between kernels: the last block to arrive resets its own.

    Kernels of one stream follow each other and share; kernels of two streams may run at once and don't. A
    captured graph may be replayed on any stream, so it has one of its own.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.retired: list[tuple[Tensor, Tensor]] = []  # graphs captured with them still point at them
        self.lock = threading.Lock()

    def get(self, device: int, partial_bytes: int, counters: int) -> tuple[Tensor, Tensor]:
        """At least `partial_bytes` of memory, and at least `counters` zeros (int32)."""
        key = (device, *stream_and_capture(device))
        with self.lock:
            held = self.held.get(key)
            if held is None or held[0].numel() < partial_bytes or held[1].numel() < counters:
                held = self._grow(key, partial_bytes, counters)
            return held

    def _grow(self, key: tuple[int, int, int], partial_bytes: int, counters: int) -> tuple[Tensor, Tensor]:
        device = torch.device("cuda", key[0])
        former = self.held.get(key)
        if former is not None:
            partial_bytes = max(partial_bytes, former[0].numel())
            counters = max(counters, former[1].numel())
            self.retired.append(former)
        partial = torch.empty(partial_bytes, dtype=torch.uint8, device=device)
        arrived = torch.zeros(counters, dtype=torch.int32, device=device)
        self.held[key] = partial, arrived
        return partial, arrived


def stream_and_capture(device: int) -> tuple[int, int]:
    """The current stream's handle and 0, or 0 and the id of the graph that it captures."""
    stream = current_stream(device)
    if not torch.cuda.is_current_stream_capturing():
        return stream, 0
    status, identity = ctypes.c_int(), ctypes.c_uint64()
    driver = open_driver()
    with driver.on(device):
        driver.call(
            "cuStreamGetCaptureInfo_v2",
            ctypes.c_void_p(stream),
            ctypes.byref(status),
            ctypes.byref(identity),
            None,
            None,
            None,
        )
    return 0, identity.value
