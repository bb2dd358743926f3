"""Weights of layer after layer on the device, the next ones read while the present ones are in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from workers.modeling.decoder import Decoder
from workers.modeling.layer_weights import Weights, changed, held

Read = Callable[[], Weights]


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
        self.waiting: Future[Weights] | None = None
        if ahead or self.stream is not None:
            self.pool = ThreadPoolExecutor(1, thread_name_prefix="weight-prefetch")
            self.read_next()

    def take(self) -> Weights:
        """The next weights. Raises what reading them raises."""
        if self.pool is None:
            return self.fetched(next(self.reads))
        assert self.waiting is not None, "nothing is left to read"
        weights = self.waiting
        self.read_next()
        tensors = weights.result()
        if self.stream is not None:
            for value in held(tensors).values():
                value.record_stream(torch.cuda.current_stream(self.device))
        return tensors

    def read_next(self) -> None:
        assert self.pool is not None
        read = next(self.reads, None)
        self.waiting = None if read is None else self.pool.submit(self.fetched, read)

    def fetched(self, read: Read) -> Weights:
        """In the thread: done when the copies are."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            copies = changed(read(), self.copied)
        if self.stream is not None:
            self.stream.synchronize()
        return copies

    def copied(self, _name: str, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
