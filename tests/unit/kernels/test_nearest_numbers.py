"""The compiled passes over groups of weights give the bytes of PyTorch's operators."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.records.specs import Recipe
from kernels import fallbacks
from kernels.cpu import nearest_numbers
from workers.modeling.float_numbers import float_codes
from workers.quantization.grid import Grid, fit_grid, group_ranges
from workers.quantization.row_rounding import RowRounder, weight_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEMES = ("fp8", "fp8-block", "nvfp4a16", "mxfp4a16", "w8a8", "wna16")


@pytest.fixture(autouse=True)
def compiled() -> None:
    if nearest_numbers.library() is None:
        pytest.skip(str(fallbacks.noted()))


def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_numbers, "library", lambda: None)


def numbers_of(dtype: torch.dtype) -> Tensor:
    """Every number of 16 bits, NaN and infinity among them; of float32 those that begin so, with zeros after
    and with random bits."""
    patterns = torch.arange(2**16, dtype=torch.int32)
    if dtype == torch.float32:
        draws = torch.randint(0, 2**16, (2**16,), generator=torch.Generator().manual_seed(0))
        return torch.cat([patterns << 16, patterns << 16 | draws.int()]).view(torch.float32)
    return patterns.to(torch.int16).view(dtype)


def scales_of(dtype: torch.dtype) -> Tensor:
    """1, random ones of all sizes, the least of the dtype and of float32, and powers of two: many ties."""
    generator = torch.Generator().manual_seed(1)
    sizes = 2.0 ** torch.randint(-24, 15, (60,), generator=generator)
    drawn = ((1 + torch.rand(60, generator=generator)) * sizes).to(dtype).float()
    least = [torch.finfo(dtype).smallest_normal, torch.finfo(dtype).smallest_normal / 2, 1e-30]
    return torch.cat([drawn, torch.tensor([1.0, 2.0**-9, 2.0**7, *least])])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_becomes_the_code_that_pytorch_gives(dtype: torch.dtype, bits: int) -> None:
    values = numbers_of(dtype)
    for scale in scales_of(dtype).tolist():
        grouped, scales = values.view(1, 1, -1), torch.full((1, 1, 1), scale)
        codes = nearest_numbers.nearest_floats(grouped, scales, bits)
        assert codes is not None
        assert torch.equal(codes, float_codes(values.float() / scale, bits).view_as(grouped)), scale


def test_fp8_is_pytorch_s_conversion_of_the_quotient() -> None:
    """Without any function of ours on the other side."""
    values = numbers_of(torch.bfloat16)
    values = values[values.isfinite()]
    for scale in scales_of(torch.bfloat16).tolist():
        quotient = (values.float() / scale).clamp(-448, 448)
        codes = nearest_numbers.nearest_floats(values.view(1, -1), torch.full((1, 1), scale), 8)
        assert codes is not None
        assert torch.equal(codes.view(-1), quotient.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_those_of_pytorch(
    dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = numbers_of(dtype)
    values = values[values.isfinite()]
    scales = scales_of(dtype)[:, None, None]
    zeros = (torch.arange(len(scales)) % 2**bits).float()[:, None, None]
    grid = Grid(scales, zeros, bits)
    grouped = values.expand(len(scales), 1, -1).contiguous()
    assert nearest_numbers.nearest_integers(grouped, scales, zeros, 2**bits - 1) is not None
    codes = grid.integers(grouped)
    in_pytorch(monkeypatch)
    assert torch.equal(codes, grid.integers(grouped))


@pytest.mark.parametrize("size", [1, 15, 16, 31, 32, 128, 333])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_are_those_of_pytorch(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = torch.randn(5, 3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    grouped[0, 0, -1] = torch.nan
    grouped[0, 1, 0] = torch.nan
    grouped[1, 0, size // 2] = torch.inf
    grouped[1, 1, size // 3] = -torch.inf
    grouped[2] = 0.0
    low, high = group_ranges(grouped)
    assert low.shape == (5, 3, 1)
    assert bool(low[0, :2].isnan().all() & high[0, :2].isnan().all())
    in_pytorch(monkeypatch)
    for own, expected in zip((low, high), group_ranges(grouped), strict=True):
        assert torch.equal(own.nan_to_num(7e7), expected.nan_to_num(7e7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_rounded_alike_with_the_library_and_without(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"method": "rtn", "scheme": name} | ({"group_size": 64} if name == "wna16" else {})
    scheme = Recipe.model_validate(recipe).scheme_of("linear")
    generator = torch.Generator().manual_seed(3)
    values = (torch.randn(256, 384, generator=generator) * torch.rand(256, 1, generator=generator)).to(dtype)
    values[7] = 0.0
    rounder = RowRounder("linear", scheme, dtype, in_float16=False, largest=values.abs().amax().float())
    compiled = rounder(values)
    error = weight_error(values, compiled)
    in_pytorch(monkeypatch)
    plain = rounder(values)
    assert compiled.equals(plain)
    assert error == pytest.approx(weight_error(values, plain), rel=1e-5)
    exact = (plain.dequantize() - values.float()).double()[::64].square().sum()
    assert error.error == pytest.approx(float(exact), rel=1e-5)


def test_ranges_without_width_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.full((2, 64), 1e-38)
    grid = fit_grid(
        *group_ranges(values.view(2, 2, 32)), Scheme(bits=4, group_size=32, symmetric=False), torch.float16
    )
    codes = grid.integers(values.view(2, 2, 32))
    in_pytorch(monkeypatch)
    assert torch.equal(codes, grid.integers(values.view(2, 2, 32)))


def test_threads_do_not_matter() -> None:
    grouped = torch.randn(64, 16, 128).to(torch.bfloat16)
    scale = torch.rand(64, 16, 1) + 0.1
    before, outcomes = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        codes = nearest_numbers.nearest_floats(grouped, scale, 8)
        assert codes is not None
        outcomes.append(codes)
    torch.set_num_threads(before)
    assert torch.equal(*outcomes)


@pytest.mark.parametrize(
    "grouped",
    [
        torch.ones(4, 2, 8, dtype=torch.float64),
        torch.ones(4, 2, 8).transpose(0, 1),
        torch.ones(4, 2, 8, requires_grad=True),
        torch.ones(0, 2, 8),
    ],
    ids=["dtype", "strides", "gradient", "empty"],
)  # fmt: skip
def test_what_the_library_does_not_read_is_left_to_pytorch(grouped: Tensor) -> None:
    scale = torch.ones(*grouped.shape[:-1], 1)
    assert nearest_numbers.ranges(grouped) is None
    assert nearest_numbers.nearest_floats(grouped, scale, 8) is None
    assert nearest_numbers.nearest_integers(grouped, scale, scale, 15) is None


def test_scales_of_another_shape_are_left_to_pytorch() -> None:
    assert nearest_numbers.nearest_floats(torch.ones(4, 8), torch.ones(8), 8) is None


def test_no_compiler_is_logged_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fallbacks, "MET", {})
    nearest_numbers.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert nearest_numbers.library() is None
            assert nearest_numbers.ranges(torch.ones(2, 4)) is None
        assert len(caplog.records) == 1
        assert "rounding to nearest ran in PyTorch" in fallbacks.noted()[0]
        assert [float(bound) for bound in group_ranges(torch.tensor([[1.0, 3.0, -2.0]]))] == [-2.0, 3.0]
    finally:
        nearest_numbers.library.cache_clear()
