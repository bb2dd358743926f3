"""Random packed weights for the kernels' tests."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import layouts, reference
from kernels.weight import PackedWeight

# Of the largest output. bf16 keeps 8 bits of a product's weight and input, fp16 11; sums are float32.
TOLERANCES = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def random_weight(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    asymmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else in_features // group_size
    q = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (out_features, groups), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out_features, groups, generator=generator) + 0.5) * 2.0 ** (-bits - 2)
    return PackedWeight(
        layouts.pack_rows(q, bits), scale.to(scale_dtype), zero if asymmetric else None, bits, group_size,
        in_features,
    )  # fmt: skip


def random_input(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(output: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    """`output` is the float64 product within what its dtype can hold."""
    expected = reference.quantized_linear(x, weight, bias)
    assert output.shape == expected.shape
    assert output.dtype == x.dtype
    if not expected.numel():
        return
    error = (output.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error < TOLERANCES[x.dtype], f"relative error {error:.2e}"
