"""Integer grids: what they promise for every range, down to the edges of the stored dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.search.grids import stored_scale
from workers.quantization.grid import grouped_view, min_max_grid

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
schemes = st.builds(
    Scheme, bits=st.sampled_from(BITS), group_size=st.sampled_from([32, -1]), symmetric=st.booleans()
)
# 2^-30 is below the smallest float16, 2^13 near the largest weight that is let through.
magnitudes = st.integers(-30, 13)


def random_weights(seed: int, magnitude: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 64, generator=generator).clamp(-2, 2) / 2 + shift) * 2.0**magnitude


def is_exact(scale: Tensor, dtype: torch.dtype) -> bool:
    return bool((scale.to(dtype).to(torch.float32) == scale).all())


@given(schemes, st.sampled_from(DTYPES), magnitudes, st.floats(-2, 2), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_grids_keep_their_promises(
    scheme: Scheme, dtype: torch.dtype, magnitude: int, shift: float, seed: int
) -> None:
    grouped = grouped_view(random_weights(seed, magnitude, shift), scheme)
    grid = min_max_grid(grouped, scheme, dtype)
    assert bool((grid.scale > 0).all())
    assert is_exact(grid.scale, torch.float16)
    assert is_exact(grid.scale, dtype)
    integers = grid.integers(grouped)
    assert torch.equal(integers, integers.round())
    assert int(integers.min()) >= 0
    assert int(integers.max()) <= 2**scheme.bits - 1
    assert torch.equal(grid.zero, grid.zero.round())
    assert int(grid.zero.min()) >= 0
    assert int(grid.zero.max()) <= 2**scheme.bits - 1
    assert bool((grid.nearest(torch.zeros_like(grouped)) == 0).all())  # zero is exact


@given(schemes, st.sampled_from(DTYPES), st.floats(-2, 2), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_the_rounding_error_is_at_most_a_step(
    scheme: Scheme, dtype: torch.dtype, shift: float, seed: int
) -> None:
    grouped = grouped_view(random_weights(seed, 0, shift), scheme)
    grid = min_max_grid(grouped, scheme, dtype)
    # Half a step inside; at the ends the stored scale may be 2^-9 smaller than the range needs.
    slack = grouped.abs().amax(dim=-1, keepdim=True) * 2**-8
    assert bool(((grid.nearest(grouped) - grouped).abs() <= grid.scale * 0.51 + 2 * slack).all())


@given(st.floats(2**-40, 2.0**40), st.sampled_from(DTYPES))
@example(1.02, torch.bfloat16)
@settings(max_examples=300, deadline=None)
def test_stored_scales_are_exact_in_both_dtypes(value: float, dtype: torch.dtype) -> None:
    scale = stored_scale(torch.tensor([value]), dtype)
    assert bool(torch.isfinite(scale.to(torch.float16)).all())
    assert is_exact(scale, torch.float16)
    assert is_exact(scale, dtype)
    if 2**-14 <= value <= 65000:
        # Rounded to one dtype, then to the other: 1.02 is a tie of bfloat16 once it has float16's digits.
        assert float(scale) == pytest.approx(value, rel=2**-8 + 2**-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float16_subnormal_survives(dtype: torch.dtype) -> None:
    scale = stored_scale(torch.arange(1, 1025) * 2.0**-24, dtype)
    assert is_exact(scale, torch.float16)
    assert is_exact(scale, dtype)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_zeros_stays_zero(bits: int, *, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    grouped = grouped_view(torch.zeros(2, 64), scheme)
    grid = min_max_grid(grouped, scheme, torch.bfloat16)
    assert bool((grid.nearest(grouped) == 0).all())
    assert bool((grid.scale == 1).all())


@pytest.mark.parametrize("value", [0.3, -0.3, 1e-6, -300.0])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_group_is_kept_within_the_scale_s_rounding(bits: int, value: float) -> None:
    scheme = Scheme(bits=bits, group_size=32, symmetric=False)
    grouped = grouped_view(torch.full((1, 32), value), scheme)
    moved = min_max_grid(grouped, scheme, torch.float16).nearest(grouped)
    # 2^-25: half of the smallest step of float16, met by tiny scales
    torch.testing.assert_close(moved, grouped, rtol=2**-10, atol=2**bits * 2**-25)


def test_values_out_of_range_are_clamped_not_wrapped() -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    grid = min_max_grid(torch.tensor([[[-1.0, 1.0]]]), scheme, torch.float32)
    assert grid.integers(torch.tensor([[[-100.0, 100.0]]])).tolist() == [[[0.0, 15.0]]]


def test_symmetric_grids_are_those_of_compressed_tensors() -> None:
    """scale = absmax / 7.5 with 4 bits, the zero point in the middle."""
    scheme = Scheme(bits=4, group_size=32, symmetric=True)
    grid = min_max_grid(torch.tensor([[[-7.5, 3.0, 0.0, 7.5]]]), scheme, torch.float32)
    assert grid.scale.item() == 1.0
    assert grid.zero.item() == 8.0
    assert grid.integers(torch.tensor([[[-7.5, 3.0, 0.0, 7.5]]])).tolist() == [[[0.0, 11.0, 8.0, 15.0]]]


def test_a_group_of_minus_one_is_the_whole_row() -> None:
    scheme = Scheme(bits=4, group_size=-1, symmetric=False)
    assert grouped_view(torch.zeros(3, 50), scheme).shape == (3, 1, 50)
