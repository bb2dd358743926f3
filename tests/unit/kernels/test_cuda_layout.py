"""The CUDA kernels' data movement, followed in Python: record, lane, fragment, product equal the reference.

What csrc/cuda/fragments.cuh and decode.cu compute is written here once more with the same addresses, masks
and magic numbers, for a whole warp at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kernels import layouts, reference
from kernels.cuda.layout import TILE_ROWS, UNIT_CHANNELS, Format, format_of, make_records
from kernels.weight import PackedWeight

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4
Words = np.ndarray


@dataclass(frozen=True)
class Numbers:
    """16-bit numbers as the kernel treats them: pairs in a word."""

    name: str

    def read(self, pairs: Words) -> np.ndarray:
        """uint32 to float64 (..., 2)."""
        halves = np.stack([pairs & 0xFFFF, pairs >> 16], axis=-1).astype(np.uint16)
        if self.name == "float16":
            return halves.view(np.float16).astype(np.float64)
        return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def round(self, values: np.ndarray) -> np.ndarray:
        dtype = torch.float16 if self.name == "float16" else torch.bfloat16
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()

    @property
    def magic_value(self) -> int:
        return 1024 if self.name == "float16" else 128

    @property
    def magic(self) -> np.uint32:
        return np.uint32(0x64006400 if self.name == "float16" else 0x43004300)


def load_words(record: np.ndarray, bits: int, half: int) -> Words:
    """(lanes, words), by the byte addresses of the kernel's loads."""

    def load(start: np.ndarray | int, count: int) -> Words:
        return np.stack([record[at : at + count].view(np.uint32) for at in start + 0 * LANE])

    if bits == 4:
        return load((half * 32 + LANE) * 16, 16)
    if bits == 8:
        return np.hstack([load((half * 64 + LANE) * 16, 16), load((half * 64 + 32 + LANE) * 16, 16)])
    low = load((half * 32 + LANE) * 8, 8)
    return low if bits == 2 else np.hstack([low, load(512 + (half * 32 + LANE) * 4, 4)])


def unpack_fragment(words: Words, bits: int, step: int, zero: np.ndarray, numbers: Numbers) -> np.ndarray:
    """(lanes, 4 pairs, 2): q - zero, every intermediate rounded to the kernel's 16-bit type."""
    pairs = [unpack_pair(words, bits, step, pair, zero[:, pair % 2, None], numbers) for pair in range(4)]
    return np.stack(pairs, axis=1)


def unpack_pair(
    words: Words, bits: int, step: int, pair: int, zero: np.ndarray, numbers: Numbers
) -> np.ndarray:
    half_precision = numbers.name == "float16"
    if bits == 8:
        both = words[:, 2 * step + pair // 2] >> np.uint32(16 * (pair % 2))
        return numbers.round(np.stack([both & 0xFF, both >> 8 & 0xFF], axis=-1) - zero)
    if bits == 4:
        place = 4 * (pair % 2) if half_precision else 0
        shifted = words[:, step] >> np.uint32(4 * pair - place)
        return magic_number(shifted & np.uint32(0x000F000F << place), place, zero, numbers)
    away = 6 if pair == 3 and not half_precision else 0
    place = 2 * pair - away
    low = words[:, step // 2] >> np.uint32(8 * (step % 2))
    value = low >> np.uint32(away) & np.uint32(0x00030003 << place)
    if bits == 3:
        if step >= 2 and pair == 3:
            high = words[:, 2] << np.uint32(8 - step % 2 - away)
        else:
            high = words[:, 2] >> np.uint32(step % 2 + (8 if step >= 2 else 0) + away)
        value |= high & np.uint32(0x00040004 << place)
    return magic_number(value, place, zero, numbers)


def magic_number(value: Words, place: int, zero: np.ndarray, numbers: Numbers) -> np.ndarray:
    """(MAGIC + q 2^place) / 2^place - (MAGIC / 2^place + zero), in one fused operation."""
    constant = numbers.round((numbers.magic_value >> place) + zero)
    return numbers.round(numbers.read(value | numbers.magic) / 2**place - constant)


def multiply_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mma.m16n8k16 on fragments: a (lanes, 4, 2), b (lanes, 2, 2) to (lanes, 4)."""
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for pair in range(4):
        for odd in range(2):
            left[ROW + 8 * (pair % 2), 2 * COLUMN + odd + 8 * (pair // 2)] = a[:, pair, odd]
    for pair in range(2):
        for odd in range(2):
            right[2 * COLUMN + odd + 8 * pair, ROW] = b[:, pair, odd]
    product = left @ right
    return np.stack([product[ROW + 8 * (c // 2), 2 * COLUMN + c % 2] for c in range(4)], axis=1)


def token_fragment(tokens: np.ndarray, channel: int) -> np.ndarray:
    """ldmatrix on two 8x8 matrices of x (8 tokens by 16 channels from `channel`): (lanes, 2, 2)."""
    columns = channel + 2 * COLUMN
    return np.stack(
        [tokens[ROW[:, None], np.stack([columns + 8 * m, columns + 8 * m + 1], 1)] for m in (0, 1)], 1
    )


def rows_of(record: np.ndarray, start: int, count: int, dtype: torch.dtype) -> np.ndarray:
    """A lane's two scales or zero points of one group: (lanes, 2)."""
    values = torch.from_numpy(record[start : start + count].copy()).view(dtype).double().numpy()
    return np.stack([values[2 * ROW], values[2 * ROW + 1]], axis=1)


def add_unit(
    sums: np.ndarray, record: np.ndarray, tokens: np.ndarray, form: Format, numbers: Numbers
) -> np.ndarray:
    """One record times 128 channels of 8 tokens."""
    for group in range(form.groups):
        size = TILE_ROWS * form.scale_dtype.itemsize
        scale = rows_of(record, form.weight_bytes + group * size, size, form.scale_dtype)
        zero = np.full((32, 2), float(2 ** (form.bits - 1)))
        if form.asymmetric:
            start = form.weight_bytes + form.scale_bytes + group * TILE_ROWS
            zero = rows_of(record, start, TILE_ROWS, torch.uint8)
        parts = np.zeros((32, 4))
        for channel in range(group * form.group_size, (group + 1) * form.group_size, 16):
            words = load_words(record, form.bits, channel // 64)
            fragment = unpack_fragment(words, form.bits, channel % 64 // 16, zero, numbers)
            parts += multiply_add(fragment, token_fragment(tokens, channel))
        sums = sums + scale[:, [0, 0, 1, 1]] * parts
    return sums


def model_linear(weight: PackedWeight, x: np.ndarray, numbers: Numbers) -> np.ndarray:
    """x (8, channels) through the records: (8, rows)."""
    form, records = format_of(weight), make_records(weight).numpy()
    units, tiles, _ = records.shape
    tokens = np.pad(x, ((0, 0), (0, units * UNIT_CHANNELS - x.shape[1])))
    output = np.zeros((8, tiles * TILE_ROWS))
    for tile in range(tiles):
        sums = np.zeros((32, 4))
        for unit in range(units):
            slab = tokens[:, unit * UNIT_CHANNELS : (unit + 1) * UNIT_CHANNELS]
            sums = add_unit(sums, records[unit, tile], slab, form, numbers)
        for c in range(4):
            output[2 * COLUMN + c % 2, tile * TILE_ROWS + ROW + 8 * (c // 2)] = sums[:, c]
    return output[:, : weight.out_features]


def random_weight(
    bits: int, group_size: int, *, rows: int = 17, channels: int = 256, asymmetric: bool = True
) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits * 1000 + group_size + channels)
    groups = 1 if group_size == -1 else channels // group_size
    q = torch.randint(0, 2**bits, (rows, channels), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.5).to(torch.bfloat16)
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    packed = layouts.pack_rows(q, bits)
    return PackedWeight(packed, scale, zero if asymmetric else None, bits, group_size, channels)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_product_is_that_of_the_reference(
    bits: int, group_size: int, asymmetric: bool, name: str
) -> None:
    weight = random_weight(bits, group_size, asymmetric=asymmetric)
    numbers = Numbers(name)
    x = numbers.round(np.random.default_rng(bits).standard_normal((8, weight.in_features)))
    expected = reference.quantized_linear(torch.from_numpy(x), weight, None).numpy()
    np.testing.assert_allclose(model_linear(weight, x, numbers), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "channels"), [(1, 32), (17, 96), (16, 160)])
def test_ragged_shapes_are_padded_with_nothing(rows: int, channels: int) -> None:
    weight = random_weight(4, 32, rows=rows, channels=channels)
    x = np.random.default_rng(rows).standard_normal((8, channels)).astype(np.float16).astype(np.float64)
    expected = reference.quantized_linear(torch.from_numpy(x), weight, None).numpy()
    np.testing.assert_allclose(model_linear(weight, x, Numbers("float16")), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_bit_of_a_record_belongs_to_one_weight(bits: int) -> None:
    ones = torch.full((16, 128), 2**bits - 1, dtype=torch.uint8)
    scale = torch.ones(16, 1, dtype=torch.float16)
    weight = PackedWeight(layouts.pack_rows(ones, bits), scale, None, bits, 128, 128)
    record = make_records(weight)[0, 0, : format_of(weight).weight_bytes]
    assert record.numel() == 256 * bits
    assert bool((record == 255).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_warp_reads_each_bank_of_shared_memory_once(bits: int) -> None:
    """Wide loads go by quarters or halves of a warp: their addresses must cover 128 contiguous bytes."""
    width = {2: 8, 3: 8, 4: 16, 8: 16}[bits]
    addresses = np.arange(32) * width
    for first in range(0, 32, 128 // width):
        banks = (addresses[first : first + 128 // width, None] + np.arange(0, width, 4)) // 4 % 32
        assert len(set(banks.ravel().tolist())) == 32


def test_ldmatrix_meets_no_bank_twice() -> None:
    """Eight rows of 16 bytes, at the padded stride of a token in shared memory."""
    stride = UNIT_CHANNELS * 2 + 16
    banks = (np.arange(8)[:, None] * stride + np.arange(0, 16, 4)) // 4 % 32
    assert len(set(banks.ravel().tolist())) == 32
