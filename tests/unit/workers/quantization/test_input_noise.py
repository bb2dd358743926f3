"""The loss of scales counts what rounding the inputs adds."""

from __future__ import annotations

import torch

from app.core.formats.schemes import SchemeName
from app.core.records.specs import Recipe
from workers.modeling.input_rounding import InputRounder
from workers.quantization.input_noise import input_noise
from workers.quantization.input_statistics import InputCollector
from workers.quantization.scale_search import ScaledLinear


def noise(name: SchemeName) -> tuple[torch.Tensor, torch.Tensor]:
    """As estimated and as measured, for scales of one and for scales that even out a wide channel."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 256, generator=generator) for rows in (2048, 64))
    inputs[:, 5] *= 40
    collector = InputCollector()
    collector.add(inputs)
    scheme = Recipe(scheme=name).scheme_of("linear")
    scales = torch.ones(2, 256)
    scales[1, 5] = 20.0
    estimated = input_noise([ScaledLinear.of(weight, scheme)], scales, collector.result("linear"))
    rounding = scheme.kind.inputs
    if rounding is None or rounding.needs_range:
        return estimated, torch.zeros(2)
    measured = [
        ((InputRounder(rounding)(inputs / each) - inputs / each) @ (weight * each).T).square().sum(1).mean()
        for each in scales
    ]
    return estimated, torch.stack(measured)


def test_integers_are_estimated_within_a_factor_of_two() -> None:
    estimated, measured = noise("w8a8")
    assert bool((estimated / measured).log().abs().amax() < torch.tensor(2.0).log())
    assert estimated[1] < estimated[0] / 10


def test_a_range_of_calibration_is_taken_where_files_hold_it() -> None:
    estimated, _ = noise("w8a8-static")
    assert estimated[0] > noise("w8a8")[0][0]


def test_numbers_with_an_exponent_and_weights_alone_add_nothing() -> None:
    names: tuple[SchemeName, ...] = ("fp8", "nvfp4", "mxfp4", "nvfp4a16")
    for name in names:
        assert noise(name)[0].tolist() == [0, 0]
