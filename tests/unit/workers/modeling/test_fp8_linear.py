"""The scaled product of FP8 weights and inputs beside the linear that rounds them and multiplies in full."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import SchemeName
from workers.modeling.float_numbers import float_codes
from workers.modeling.fp8_linear import Fp8Linear, why_not_fp8
from workers.modeling.input_rounding import InputRounder
from workers.modeling.quantized_weight import QuantizedWeight
from workers.modeling.rounding_linear import RoundingLinear

CPU = torch.device("cpu")
# A product of numbers that are exact in both: only the order of float32 sums differs, then one rounding.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def weight_of(rows: int, channels: int, scheme: SchemeName) -> QuantizedWeight:
    values = torch.randn(rows, channels)
    scale = values.abs().amax(1, keepdim=True) / 448
    zero = torch.zeros(rows, 1, dtype=torch.uint8)
    kind = Scheme(bits=8, group_size=-1, symmetric=True, name=scheme)
    return QuantizedWeight(float_codes(values / scale, 8), scale, zero, kind)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scheme", ["fp8", "fp8-static"])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
def test_it_is_what_rounding_and_multiplying_gives(
    dtype: torch.dtype, scheme: SchemeName, shape: tuple[int, ...]
) -> None:
    """Rows of very different sizes, one of zeros, and for one scale some beyond its range."""
    weight = weight_of(48, 64, scheme)
    x = torch.randn(*shape, 64, dtype=dtype) * torch.logspace(-2, 1, shape[-1]).to(dtype)[:, None]
    x[..., 0, :] = 0 if shape[-1] > 1 else x[..., 0, :]
    inputs = weight.scheme.kind.inputs
    assert inputs is not None
    rounder = InputRounder(inputs, torch.tensor([0.01]) if scheme == "fp8-static" else None)
    options = {"dtype": dtype, "device": CPU, "bias": torch.randn(48)}
    expected = RoundingLinear(weight, rounder, **options)(x)  # type: ignore[arg-type]
    found = Fp8Linear(weight, rounder, **options)(x)  # type: ignore[arg-type]
    assert found.dtype == dtype
    assert float((found - expected).double().norm() / expected.double().norm()) < TOLERANCES[dtype]


def test_it_takes_half_the_bytes() -> None:
    weight = weight_of(64, 256, "fp8")
    inputs = weight.scheme.kind.inputs
    assert inputs is not None
    linears = [
        kind(weight, InputRounder(inputs), dtype=torch.bfloat16, device=CPU)
        for kind in (Fp8Linear, RoundingLinear)
    ]
    assert linears[0].packed_bytes == 64 * 256 + 4 * 64
    assert linears[1].packed_bytes == 2 * 64 * 256


def test_what_it_can_not_compute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(48, 64, "fp8")
    inputs = weight.scheme.kind.inputs
    assert inputs is not None
    rounder, gpu, bf16 = InputRounder(inputs), torch.device("cuda", 0), torch.bfloat16
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert why_not_fp8(weight, rounder, bf16, gpu) is None
    assert why_not_fp8(weight, rounder, bf16, CPU) == "the device has no products of FP8"
    assert why_not_fp8(weight, rounder, torch.float16, gpu) == "it computes in torch.float16, not in bfloat16"
    assert why_not_fp8(weight, None, bf16, gpu) == (
        "its inputs are not FP8 with a scale for each token or one for all"
    )
    assert why_not_fp8(weight_of(47, 64, "fp8"), rounder, bf16, gpu) == "its sizes are no multiples of 16"
    blocks = replace(weight, scale=weight.scale.repeat(1, 2))
    assert why_not_fp8(blocks, rounder, bf16, gpu) == "its weights are not FP8 with a scale for each row"
    capability = (8, 0)
    assert why_not_fp8(weight, rounder, bf16, gpu) == "the device has no products of FP8"
