"""Packing: against an obvious bit stream, against compressed-tensors' own code, and back again."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.layouts import (
    AWQ_ORDER,
    AWQ_POSITION,
    from_stored_zeros,
    pack_awq,
    pack_gptq,
    pack_rows,
    packed_words,
    to_stored_zeros,
    unpack_awq,
    unpack_gptq,
    unpack_rows,
)

BITS = (2, 3, 4, 8)


@st.composite
def packings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """uint8 (rows, n) and the bits of each value; n is often no multiple of a word."""
    bits = draw(st.sampled_from(BITS))
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 97))
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count))
    return torch.tensor(values, dtype=torch.uint8).view(rows, count), bits


def bit_stream_words(row: list[int], bits: int) -> list[int]:
    """One row as a big integer, cut into signed 32-bit words: slow and obvious."""
    stream = sum(value << (index * bits) for index, value in enumerate(row))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(packings())
@settings(max_examples=100, deadline=None)
def test_rows_come_back(case: tuple[Tensor, int]) -> None:
    values, bits = case
    packed = pack_rows(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (values.shape[0], packed_words(values.shape[1], bits))
    assert torch.equal(unpack_rows(packed, bits, values.shape[1]), values)


@given(packings())
@settings(max_examples=100, deadline=None)
def test_rows_are_one_bit_stream(case: tuple[Tensor, int]) -> None:
    values, bits = case
    assert pack_rows(values, bits).tolist() == [bit_stream_words(row, bits) for row in values.tolist()]


@given(packings())
@settings(max_examples=100, deadline=None)
def test_rows_are_packed_as_compressed_tensors_packs_them(case: tuple[Tensor, int]) -> None:
    values, bits = case
    signed = (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_rows(values, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, signed.shape), signed)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_packed_along_the_first_dimension(bits: int) -> None:
    zeros = torch.randint(0, 2**bits, (40, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    signed = (zeros.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_rows(zeros.T.contiguous(), bits).T
    assert torch.equal(packed, pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_value_that_does_not_fit_is_refused(bits: int) -> None:
    values = torch.zeros(1, 8, dtype=torch.uint8)
    values[0, 5] = 2**bits
    with pytest.raises(ValueError, match=f"value {2**bits} does not fit {bits} bits"):
        pack_rows(values, bits)


def test_the_order_of_awq_is_the_one_of_its_kernels() -> None:
    """Nibble 0 is channel 0, nibble 1 channel 2, ... as in AutoAWQ's `packing_utils.py`."""
    assert pack_awq(torch.arange(8, dtype=torch.uint8)[None]).tolist() == [[0x75316420]]
    assert AWQ_ORDER == (0, 2, 4, 6, 1, 3, 5, 7)
    assert AWQ_POSITION == (0, 4, 1, 5, 2, 6, 3, 7)


def test_the_highest_nibble_of_awq_sets_the_sign() -> None:
    values = torch.zeros(1, 8, dtype=torch.uint8)
    values[0, 7] = 15
    assert pack_awq(values).tolist() == [[-(2**28)]]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_awq_comes_back(rows: int, words: int, seed: int) -> None:
    values = torch.randint(0, 16, (rows, 8 * words), generator=torch.Generator().manual_seed(seed))
    values = values.to(torch.uint8)
    assert torch.equal(unpack_awq(pack_awq(values)), values)


@given(packings())
@settings(max_examples=60, deadline=None)
def test_gptq_is_a_bit_stream_down_each_column(case: tuple[Tensor, int]) -> None:
    rows, bits = case
    packed = pack_gptq(rows.T.contiguous(), bits)
    assert packed.T.tolist() == [bit_stream_words(row, bits) for row in rows.tolist()]
    assert torch.equal(unpack_gptq(packed, bits, rows.shape[1]), rows.T)


@given(packings())
@settings(max_examples=60, deadline=None)
def test_gptq_stores_zero_points_less_one(case: tuple[Tensor, int]) -> None:
    values, bits = case
    zeros = values.clamp(min=1)
    packed = pack_rows(to_stored_zeros(zeros), bits)
    assert packed.tolist() == [bit_stream_words([zero - 1 for zero in row], bits) for row in zeros.tolist()]
    assert torch.equal(from_stored_zeros(unpack_rows(packed, bits, zeros.shape[1])), zeros)


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_points_of_gptq_are_one_word(bits: int, word: int) -> None:
    zeros = torch.full((1, 32), 2 ** (bits - 1), dtype=torch.uint8)
    assert set(pack_rows(to_stored_zeros(zeros), bits).view(-1).tolist()) == {word}


def test_a_zero_point_of_zero_is_refused_by_gptq() -> None:
    with pytest.raises(ValueError, match="zero point of 0"):
        to_stored_zeros(torch.tensor([[3, 0, 1]], dtype=torch.uint8))
