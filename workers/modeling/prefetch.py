"""A layer's weights on the device, the next layer's read meanwhile."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from workers.modeling.decoder import Decoder


class WeightPrefetch:
    """Weights of the layers up to `last`, in the checkpoint's dtype on the decoder's device.

    On a GPU a thread reads the next layer into pinned memory and copies it on a stream of its own. On a CPU
    nothing is gained by reading ahead, and a second layer would stay in memory.
    """

    def __init__(self, decoder: Decoder, last: int) -> None:
        self.decoder, self.last = decoder, last
        self.waiting: dict[int, Future[dict[str, Tensor]]] = {}
        self.pool: ThreadPoolExecutor | None = None
        if decoder.device.type == "cuda":
            self.pool = ThreadPoolExecutor(1, thread_name_prefix="weight-prefetch")
            self.stream = torch.cuda.Stream(decoder.device)  # type: ignore[no-untyped-call]

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        """The weights of `layer`, by name in the layer. Raises what reading them raises."""
        if self.pool is None:
            return self.decoder.layer_weights(layer)
        weights = self.waiting.pop(layer, None) or self.pool.submit(self.upload, layer)
        if layer < self.last:
            self.waiting[layer + 1] = self.pool.submit(self.upload, layer + 1)
        found = weights.result()
        for value in found.values():
            value.record_stream(torch.cuda.current_stream(self.decoder.device))
        return found

    def upload(self, layer: int) -> dict[str, Tensor]:
        """In the thread: done when the copies are."""
        stored = self.decoder.layer_weights(layer, pinned=True)
        with torch.cuda.stream(self.stream):
            copies = {
                name: value.to(self.decoder.device, non_blocking=True) for name, value in stored.items()
            }
        self.stream.synchronize()
        return copies

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
