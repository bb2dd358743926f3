"""Inputs are rounded as compressed-tensors rounds them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from torch import nn

from app.core.formats.compressed_tensors import input_arguments
from app.core.formats.schemes import SCHEMES, SchemeName
from workers.modeling.input_rounding import InputRounder, rounding_inputs, static_scale

ROUNDED = [name for name, kind in SCHEMES.items() if kind.inputs is not None]


@pytest.mark.parametrize("name", ROUNDED)
def test_values_are_those_of_compressed_tensors(name: SchemeName) -> None:
    inputs = SCHEMES[name].inputs
    assert inputs is not None
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0] = 0.0
    arguments = QuantizationArgs.model_validate(input_arguments(inputs))
    scale = static_scale(inputs, x.abs().amax(), torch.float32) if inputs.needs_range else None
    own = InputRounder(inputs, scale)(x)
    if inputs.scope == "tensor":
        their_scale, zero = calculate_qparams(x.amin(), x.amax(), arguments)
        theirs = fake_quantize(x, their_scale, zero, arguments)
    else:
        above = scale if inputs.scales == "e4m3" else None
        their_scale, zero = compute_dynamic_scales_and_zp(x, arguments, nn.Identity(), above)
        theirs = fake_quantize(x, their_scale, zero, arguments, global_scale=above)
    assert torch.allclose(own, theirs, rtol=1e-6, atol=1e-6)
    assert not torch.equal(own, x)


def test_hooks_round_while_they_are_there() -> None:
    layer = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Identity())
    inputs = SCHEMES["w8a8"].inputs
    assert inputs is not None
    x, rounder = torch.randn(4, 32), InputRounder(inputs)
    with rounding_inputs(layer, {"0": rounder}):
        rounded = layer(x)
    assert torch.equal(rounded, layer(rounder(x)))
    assert not torch.equal(rounded, layer(x))
