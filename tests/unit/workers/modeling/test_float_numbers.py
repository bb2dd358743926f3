"""FP8, FP4 and powers of two, beside what compressed-tensors makes of the same values."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale, decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from hypothesis import given
from hypothesis import strategies as st

from workers.modeling import float_numbers as numbers

CODES = torch.arange(16, dtype=torch.uint8)


def test_every_code_of_fp4_is_the_nearest_to_its_own_value() -> None:
    values = numbers.fp4_values(CODES)
    assert values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(values[8:], -values[:8])
    assert torch.equal(numbers.fp4_values(numbers.fp4_codes(values)), values)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),  # ties
        (0.26, 0.5), (0.74, 0.5), (4.99, 4.0), (5.01, 6.0), (1e9, 6.0),
    ],
)  # fmt: skip
def test_ties_go_to_the_even_code_and_what_is_too_large_to_the_largest(value: float, nearest: float) -> None:
    both = torch.tensor([value, -value])
    assert numbers.fp4_values(numbers.fp4_codes(both)).tolist() == [nearest, -nearest]


def test_two_codes_share_a_byte_as_in_compressed_tensors() -> None:
    codes = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = numbers.packed_fp4(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(numbers.fp4_values(codes).to(torch.bfloat16)))
    assert torch.equal(numbers.unpacked_fp4(packed), codes)
    values = unpack_fp4_from_uint8(packed, 5, 64)
    assert torch.equal(values.float(), numbers.fp4_values(codes))


def test_every_fp8_pattern_comes_back() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)  # no NaN
    assert torch.equal(numbers.fp8_codes(numbers.fp8_values(codes)), codes)
    assert numbers.fp8_values(numbers.fp8_codes(torch.tensor([1e5, -1e5]))).tolist() == [448, -448]


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_scales_of_mxfp4_are_those_of_compressed_tensors(largest: float) -> None:
    sizes = torch.tensor([largest])
    theirs = generate_mx_scales(sizes).to(torch.uint8)
    own = numbers.microscale(sizes)
    assert torch.equal(numbers.exponent_codes(own), theirs)
    assert torch.equal(numbers.exponent_codes(own), compress_mx_scale(own, torch.uint8))
    assert torch.equal(numbers.exponent_values(theirs), decompress_mx_scale(theirs).float())
