"""Weights that were quantized before, computed while they are read, some rows at a time.

What the stored tensors are is in their headers (app/core/sources/quantized_layouts.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from app.core.errors import ModelRefused
from app.core.sources.safetensors_header import QuantizedValues, TensorHeader
from kernels.layouts import from_stored_zeros
from kernels.operators import unpack
from workers.modeling.float_numbers import exponent_values, fp4_values, unpacked_fp4
from workers.modeling.stored_bytes import read_into
from workers.modeling.stored_dtypes import DTYPES

ALIGNED_ROWS = 32  # that are whole words in every packing
COLUMN_PACKED = ("awq", "gptq", "gptq_v2")


def quantized_chunks(folder: Path, header: TensorHeader, chunk_bytes: int) -> Iterator[Tensor]:
    """The values in order, flat, as float32: whole rows at a time."""
    values = header.quantized
    assert values is not None
    matrix, rows = StoredMatrix(folder, values), math.prod(header.shape[:-1])
    step = max(1, chunk_bytes // (4 * values.shape[1] * values.step) // ALIGNED_ROWS) * ALIGNED_ROWS
    for first in range(0, rows, step):
        yield matrix.rows(first, min(step, rows - first)).reshape(-1)


class StoredMatrix:
    """Matrices below each other, of whose stored tensors rows are read as they are asked for.

    AWQ and GPTQ pack along the rows of a matrix: their words are held whole, an eighth or a quarter of it.
    """

    def __init__(self, folder: Path, values: QuantizedValues) -> None:
        self.folder, self.values = folder, values
        self.height, self.columns = values.shape
        self.matrices = math.prod(values.codes.shape[:-2])
        self.scale_rows = -(-self.height // values.block[0])  # of each matrix
        if values.stored_shape is not None:
            stored = tuple(self.whole(values.stored_shape).tolist())
            if stored != values.shape:
                raise damaged(
                    values, f"its weight_shape is {stored}, and its other tensors make {values.shape}"
                )

    def rows(self, first: int, count: int) -> Tensor:
        """float32 (count, columns), from row `first` of the tensor on."""
        values = self.values
        numbers = values.first_row + values.step * torch.arange(first, first + count)
        start, span = int(numbers[0]), values.step * (count - 1) + 1
        codes = self.codes(start, span)[:: values.step]
        blocks = numbers // self.height * self.scale_rows + numbers % self.height // values.block[0]
        scales = self.by_column(self.scales(blocks))
        zeros = self.zeros(blocks)
        return (codes if zeros is None else codes - self.by_column(zeros)) * scales

    def by_column(self, grouped: Tensor) -> Tensor:
        """(rows, groups) values as (rows, columns)."""
        return grouped if grouped.shape[1] == 1 else grouped.index_select(1, self.groups)

    @cached_property
    def groups(self) -> Tensor:
        """int64 (columns,)."""
        order = self.values.column_groups
        if order is None:
            return torch.arange(self.columns) // self.values.block[1]
        groups, count = self.whole(order).long(), -(-self.columns // self.values.block[1])
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            raise damaged(self.values, f"its g_idx names groups beyond its {count}")
        return groups

    def codes(self, first: int, count: int) -> Tensor:
        """float32 (count, columns), of which integers without zero points in the files are signed."""
        values, bits = self.values, self.values.bits
        if values.packing in COLUMN_PACKED:
            return self.column_packed(first, count).to(torch.float32)
        stored = self.stored_rows(values.codes, first, count)
        if values.packing == "plain":
            return stored.to(torch.float32)
        if values.packing == "fp4":
            return fp4_values(unpacked_fp4(stored.view(torch.uint8)))
        return integers(stored, bits, self.columns).to(torch.float32)

    def column_packed(self, first: int, count: int) -> Tensor:
        """uint8 (count, columns)."""
        if self.values.packing == "awq":
            words = self.words[:, first // 8 : (first + count) // 8].contiguous()
            return integers(words, 4, count, interleaved=True).T
        return integers(self.words[:, first : first + count].T.contiguous(), self.values.bits, self.columns)

    @cached_property
    def words(self) -> Tensor:
        return self.whole(self.values.codes)

    def scales(self, blocks: Tensor) -> Tensor:
        """float32 (rows, groups) for the given rows of scales."""
        values = self.values
        if values.packing in COLUMN_PACKED:
            return self.column_scales[blocks]
        first, last = int(blocks[0]), int(blocks[-1])
        scales = numbers_of(self.stored_rows(values.scales, first, last - first + 1))[blocks - first]
        if values.factor is not None:
            scales = scales * self.whole(values.factor).view(())
        if values.divisor is not None:
            scales = scales / self.whole(values.divisor).view(())
        return scales

    @cached_property
    def column_scales(self) -> Tensor:
        return self.whole(self.values.scales).T.to(torch.float32)

    def zeros(self, blocks: Tensor) -> Tensor | None:
        """float32 (rows, groups) for the given rows of zeros; None where all are 0."""
        values = self.values
        if values.packing in ("plain", "fp4") and values.zeros is None:
            return None
        if values.zeros is None:
            return torch.full((1, 1), 2.0 ** (values.bits - 1))
        return self.all_zeros[blocks].to(torch.float32)

    @cached_property
    def all_zeros(self) -> Tensor:
        """(rows, groups) of the whole matrix."""
        values = self.values
        assert values.zeros is not None
        stored = self.whole(values.zeros)
        if values.packing == "plain":
            return stored.view(self.scale_rows, -1)
        if values.packing == "rows":
            return integers(stored, values.bits, self.height, down=True)
        zeros = integers(stored, values.bits, self.height, interleaved=values.packing == "awq").T
        return from_stored_zeros(zeros) if values.packing == "gptq" else zeros

    def stored_rows(self, tensor: TensorHeader, first: int, count: int) -> Tensor:
        """Rows of a stored tensor, as many in a matrix as it has of codes, or of scales."""
        per_matrix = self.height if tensor is self.values.codes else self.scale_rows
        dtype = DTYPES[tensor.dtype]
        width = math.prod(tensor.shape) // (self.matrices * per_matrix)
        stored = torch.empty(count, width, dtype=dtype)
        read_into(self.folder / tensor.file, tensor.start + first * width * dtype.itemsize, stored)
        return stored

    def whole(self, tensor: TensorHeader) -> Tensor:
        stored = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        read_into(self.folder / tensor.file, tensor.start, stored)
        return stored


def integers(
    words: Tensor, bits: int, count: int, *, down: bool = False, interleaved: bool = False
) -> Tensor:
    """uint8 from packed words, as kernels/operators.py has it."""
    values: Tensor = unpack(words, bits, count, down=down, interleaved=interleaved)
    return values


def numbers_of(scales: Tensor) -> Tensor:
    """float32 of stored scales: bytes are exponents."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return exponent_values(scales.view(torch.uint8))
    return scales.to(torch.float32)


def damaged(values: QuantizedValues, why: str) -> ModelRefused:
    return ModelRefused(
        f"a weight in {values.codes.file} can't be read: {why}",
        code="quantized_source_invalid", remedy="download the model again, or submit the original model",
    )  # fmt: skip
