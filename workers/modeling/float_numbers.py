"""Numbers of few bits with an exponent: FP8 (e4m3), FP4 (e2m1) and powers of two (e8m0).

Sources: OCP 8-bit Floating Point 1.0; OCP Microscaling Formats 1.0, whose e2m1 and e8m0 these are. Rounding
is to nearest, ties to even, and numbers beyond the largest become the largest.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
FP8_SMALLEST = 2.0**-9  # above zero
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
FP4_LARGEST = FP4_VALUES[-1]
FP4_SIGN = 8
EXPONENT_BIAS = 127  # of e8m0

# Where the next larger code begins. At a tie the even code wins: a tie after an odd one goes up.
FP4_BOUNDS = tuple(
    (low + high) / 2 if code % 2 == 0 else (low + high) / 2 * (1 - 2**-24)
    for code, (low, high) in enumerate(pairwise(FP4_VALUES))
)


def fp4_codes(values: Tensor) -> Tensor:
    """uint8 codes 0..15 of float32 values, same shape."""
    codes = torch.bucketize(values.abs(), torch.tensor(FP4_BOUNDS, device=values.device))
    return codes.to(torch.uint8) + FP4_SIGN * (values < 0).to(torch.uint8)


def fp4_values(codes: Tensor) -> Tensor:
    """float32 values of uint8 codes."""
    table = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)), device=codes.device)
    return table[codes.int()]


def fp8_codes(values: Tensor) -> Tensor:
    """uint8 bit patterns of float32 values."""
    return values.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8).view(torch.uint8)


def fp8_values(codes: Tensor) -> Tensor:
    """float32 values of uint8 bit patterns."""
    return codes.view(FP8).to(torch.float32)


def nearest_fp8(values: Tensor) -> Tensor:
    """float32 values that FP8 holds."""
    return values.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8).to(torch.float32)


def fp8_scales(scales: Tensor, divisor: Tensor) -> Tensor:
    """Positive scales as the nearest that are FP8 divided by `divisor`."""
    return nearest_fp8(scales * divisor).clamp(min=FP8_SMALLEST) / divisor


def float_codes(values: Tensor, bits: int) -> Tensor:
    """Codes of the numbers with so many bits, 4 or 8."""
    return fp4_codes(values) if bits == 4 else fp8_codes(values)


def float_values(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `float_codes`."""
    return fp4_values(codes) if bits == 4 else fp8_values(codes)


def largest_float(bits: int) -> float:
    """Of the numbers with so many bits."""
    return FP4_LARGEST if bits == 4 else FP8_LARGEST


def packed_fp4(codes: Tensor) -> Tensor:
    """(rows, C) codes as (rows, C / 2) bytes, the first of two in the low half."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpacked_fp4(packed: Tensor) -> Tensor:
    """The inverse of `packed_fp4`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def power_of_two(values: Tensor) -> Tensor:
    """The powers of two in e8m0's range at or below positive float32 values."""
    exponents = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.ones_like(values), exponents.clamp(-EXPONENT_BIAS + 1, EXPONENT_BIAS))


def exponent_codes(powers: Tensor) -> Tensor:
    """uint8 e8m0 of powers of two."""
    return (torch.frexp(powers).exponent - 1 + EXPONENT_BIAS).to(torch.uint8)


def exponent_values(codes: Tensor) -> Tensor:
    """float32 powers of two of e8m0."""
    return torch.ldexp(torch.ones(codes.shape, device=codes.device), codes.int() - EXPONENT_BIAS)


def microscale(largest: Tensor) -> Tensor:
    """The power of two that divides a group of FP4 whose largest size is `largest` (positive).

    The rule of compressed-tensors: `largest`, rounded to a power of two, becomes 4. From 1.75 of a power on
    it is rounded up; up to there what is beyond 6 is cut off.
    """
    return power_of_two(power_of_two(largest + power_of_two(largest) / 4) / 4)
