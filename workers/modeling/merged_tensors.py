"""Weights with an adapter merged into them, computed in float32 while they are read, some rows at a time.

What the adapter changes is in the headers (app/core/sources/adapter_model.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from app.core.sources.safetensors_header import MergedValues, TensorHeader
from workers.modeling.stored_bytes import read_into
from workers.modeling.stored_dtypes import DTYPES


def merged_chunks(values: MergedValues, base: Iterable[Tensor], adapter: Path) -> Iterator[Tensor]:
    """The values in order, flat, as float32. `base` are those of the model, in chunks."""
    if values.whole is not None:
        base = [read_float32(adapter, values.whole).view(-1)]
    if values.down is None or values.up is None:
        yield from base
        return
    down, up = read_float32(adapter, values.down), read_float32(adapter, values.up)
    if values.table:
        down, up = up.T, down.T
    magnitude = None if values.magnitude is None else read_float32(adapter, values.magnitude)
    first = 0
    for rows in whole_rows(base, values.base.shape[1]):
        last = first + len(rows)
        rows.addmm_(up[first:last], down, alpha=values.scale)
        if magnitude is not None:  # DoRA, arXiv:2402.09353, equation 5
            rows *= (magnitude[first:last] / rows.norm(dim=1))[:, None]
        yield rows.view(-1)
        first = last


def whole_rows(chunks: Iterable[Tensor], columns: int) -> Iterator[Tensor]:
    """Flat chunks as new matrices (rows, columns) of float32."""
    rest = torch.empty(0)
    for chunk in chunks:
        values = torch.cat([rest, chunk.float()])
        end = values.numel() // columns * columns
        rest = values[end:]
        if end:
            yield values[:end].view(-1, columns)


def read_float32(folder: Path, header: TensorHeader) -> Tensor:
    """A plain tensor of the adapter."""
    stored = torch.empty(header.shape, dtype=DTYPES[header.dtype])
    if stored.numel():
        read_into(folder / header.file, header.start, stored)
    return stored.float()
