"""Rows of a checkpoint's tensors, read where they lie in the files: by several threads, nothing mapped."""

from __future__ import annotations

import os
from threading import Lock, local
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from app.core.errors import ModelRefused
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.stored_dtypes import DTYPES

AHEAD_BYTES = 1 << 25


class RowReader:
    """Reads slices of the tensors whose values lie in their files as they are."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.files: dict[str, int] = {}
        self.announced: dict[str, int] = {}  # up to where the system was asked to read
        self.lock = Lock()
        self.own = local()  # memory of a thread

    def is_plain(self, name: str) -> bool:
        """Whether the tensor's rows lie one after another."""
        header = self.source.header(name)
        return header.encoding is None and not header.strides

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix, in its dtype, until this thread reads again."""
        header = self.source.header(name)
        dtype, columns = DTYPES[header.dtype], header.shape[1]
        row = columns * dtype.itemsize
        return self.raw(name, start * row, stop * row).view(dtype).view(stop - start, columns)

    def raw(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes of a tensor, uint8, until this thread reads again."""
        header = self.source.header(name)
        values = self.memory(stop - start)
        self.fill(header.file, header.start + start, values)
        return values

    def memory(self, size: int) -> Tensor:
        """So many bytes, the same ones each time: fresh ones would have to be cleared by the system."""
        buffer: Tensor | None = getattr(self.own, "buffer", None)
        if buffer is None or buffer.numel() < size:
            buffer = self.own.buffer = torch.empty(size, dtype=torch.uint8)
        return buffer[:size]

    def fill(self, file: str, start: int, values: Tensor) -> None:
        """Read bytes from `start` on. Raises ModelRefused if the file ends before."""
        buffer = values.numpy().data
        self.announce(file, start, start + len(buffer))
        while buffer:
            count = os.preadv(self.descriptor(file), [buffer], start)
            if count == 0:
                raise ModelRefused(
                    f"{file} ended early while a tensor was read",
                    code="model_header_invalid", remedy="the file changed under the job: submit it again",
                )  # fmt: skip
            buffer, start = buffer[count:], start + count

    def announce(self, file: str, start: int, stop: int) -> None:
        """Have the system read on: the reads of several threads do not look like one that goes on."""
        descriptor = self.descriptor(file)
        with self.lock:
            reached = self.announced.get(file, start)
            if not start <= reached <= stop + AHEAD_BYTES // 2:
                return
            self.announced[file] = max(reached, stop) + AHEAD_BYTES
        os.posix_fadvise(descriptor, reached, max(0, stop - reached) + AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    def descriptor(self, file: str) -> int:
        with self.lock:
            if file not in self.files:
                self.files[file] = os.open(self.source.folder / file, os.O_RDONLY | os.O_CLOEXEC)
            return self.files[file]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
