"""Rounding to numbers with an exponent: each step may only lower the loss, and scales are what files hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import SCHEMES, SchemeName
from app.core.records.specs import Recipe
from workers.formats.compressed_tensors_packing import pack_linear, unpack_linear
from workers.modeling.float_numbers import FP4_LARGEST, FP8_LARGEST
from workers.modeling.quantized_weight import QuantizedWeight
from workers.quantization.float_grids import float_grid, float_rounding_errors
from workers.quantization.rounding import FoldedLinear, round_linear

FLOATS: list[SchemeName] = ["fp8", "fp8-block", "nvfp4a16", "mxfp4a16"]


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights (128, 256) with rows of different size, and H of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(128, 256, generator=generator) * torch.rand(128, 1, generator=generator)
    inputs = torch.randn(1024, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    inputs[:, 7] *= 20
    return weight, inputs.T @ inputs / len(inputs)


def scheme_of(name: SchemeName) -> Scheme:
    return Recipe(scheme=name).scheme_of("linear")


@pytest.mark.parametrize("name", FLOATS)
def test_search_and_gptq_lower_the_loss(name: SchemeName) -> None:
    weight, moment = problem()
    linear = FoldedLinear("linear", weight, moment, scheme_of(name), weight)
    plain, awq, gptq = (
        round_linear(linear, Recipe(scheme=name, method=method), torch.bfloat16)
        for method in ("rtn", "awq", "gptq")
    )
    assert plain.loss == plain.loss_unclipped == awq.loss_unclipped
    assert awq.loss <= plain.loss
    assert gptq.loss < 0.7 * awq.loss
    for outcome in (plain, awq, gptq):
        error = outcome.weight.dequantize() - weight
        assert float(((error @ moment) * error).sum()) == pytest.approx(outcome.loss, rel=1e-3)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_files_hold_what_was_computed(name: SchemeName, method: str) -> None:
    weight, moment = problem(1)
    weight[:, 32:64] = 0.0  # groups without any size
    linear = FoldedLinear("linear", weight, moment, scheme_of(name), weight)
    rounded = round_linear(linear, Recipe(scheme=name, method=method), torch.bfloat16).weight
    read = unpack_linear(pack_linear(rounded, torch.bfloat16), {}, rounded.scheme)
    assert isinstance(read, QuantizedWeight)
    assert read.equals(rounded)
    assert torch.isfinite(read.dequantize()).all()


def test_rows_of_a_block_share_their_scale() -> None:
    weight, _ = problem()
    grid = float_grid(weight.view(128, 2, 128), scheme_of("fp8-block"), torch.float32)
    assert torch.equal(grid.scale, grid.scale[:1].expand_as(grid.scale))
    assert float(grid.scale[0, 0]) == float(weight[:, :128].abs().max() / FP8_LARGEST)


def test_linears_that_servers_fuse_share_one_divisor() -> None:
    weight, moment = problem()
    scheme, largest = scheme_of("nvfp4a16"), torch.tensor(100.0)
    linear = FoldedLinear("linear", weight, moment, scheme, weight, largest)
    rounded = round_linear(linear, Recipe(scheme="nvfp4a16", method="rtn"), torch.bfloat16).weight
    assert rounded.divisor is not None
    assert float(rounded.divisor) == pytest.approx(FP8_LARGEST * FP4_LARGEST / 100)


@pytest.mark.parametrize("name", FLOATS)
def test_errors_of_scaled_weights_are_those_of_rounding_them(name: SchemeName) -> None:
    weight, _ = problem()
    scales = torch.tensor([1.0, 2.0])[:, None] * torch.linspace(0.5, 2, 256)
    errors = float_rounding_errors(weight, scales, scheme_of(name), torch.float32)
    for factors, error in zip(scales, errors, strict=True):
        scaled = weight * factors
        grouped = scaled.view(128, scheme_of(name).groups(256), -1)
        rounded = float_grid(grouped, scheme_of(name), torch.float32).nearest(grouped).view_as(weight)
        assert torch.allclose(error, (rounded - scaled) / factors)


def test_the_schemes_with_exponents_are_those_tested_here_and_their_kin() -> None:
    names = {name for name, kind in SCHEMES.items() if kind.numbers == "float"}
    assert names == {*FLOATS, "fp8-static", "nvfp4", "mxfp4"}
