"""Weights of layer after layer on the device, the next ones read while the present ones are in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from workers.modeling.decoder import Decoder

Read = Callable[[], dict[str, Tensor]]


def layer_reads(decoder: Decoder, layers: Iterable[int]) -> Iterator[Read]:
    """The checkpoint's weights of these layers, by name in the layer, in pinned memory for a GPU."""
    pinned = decoder.device.type == "cuda"
    return (partial(decoder.layer_weights, layer, pinned=pinned) for layer in layers)


class WeightPrefetch:
    """The results of `reads`, in order, on the device.

    On a GPU a thread makes the next read and its copies on a stream of its own. On a CPU nothing is gained
    by reading ahead, and a second layer would stay in memory, so it is only done if `ahead` asks for it.
    """

    def __init__(self, device: torch.device, reads: Iterable[Read], *, ahead: bool = False) -> None:
        self.device, self.reads = device, iter(reads)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.pool: ThreadPoolExecutor | None = None
        self.waiting: Future[dict[str, Tensor]] | None = None
        if ahead or self.stream is not None:
            self.pool = ThreadPoolExecutor(1, thread_name_prefix="weight-prefetch")
            self.read_next()

    def take(self) -> dict[str, Tensor]:
        """The next weights. Raises what reading them raises."""
        if self.pool is None:
            return self.fetched(next(self.reads))
        assert self.waiting is not None, "nothing is left to read"
        weights = self.waiting
        self.read_next()
        tensors = weights.result()
        if self.stream is not None:
            for value in tensors.values():
                value.record_stream(torch.cuda.current_stream(self.device))
        return tensors

    def read_next(self) -> None:
        assert self.pool is not None
        read = next(self.reads, None)
        self.waiting = None if read is None else self.pool.submit(self.fetched, read)

    def fetched(self, read: Read) -> dict[str, Tensor]:
        """In the thread: done when the copies are."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            copies = {name: value.to(self.device, non_blocking=True) for name, value in read().items()}
        if self.stream is not None:
            self.stream.synchronize()
        return copies

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
