"""Linears of served models with FP8 weights and inputs, by PyTorch's scaled product on GPUs that have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.modeling.float_numbers import FP8_LARGEST
from workers.modeling.input_rounding import InputRounder
from workers.modeling.quantized_weight import QuantizedWeight

CAPABILITY = (8, 9)  # Ada, Hopper and later multiply FP8
MULTIPLE = 16  # of rows and channels that the product takes


class Fp8Linear(nn.Linear):
    """x8 W8^T times the scales of x's rows and of W's, plus bias: as RoundingLinear, from bytes."""

    scale: Tensor  # float32 (1, out_features)

    def __init__(
        self,
        weight: QuantizedWeight,
        rounder: InputRounder,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None = None,
    ) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta", dtype=dtype)
        self.scheme, self.rounder, self.dtype = weight.scheme, rounder, dtype
        codes = weight.q.to(device).contiguous().view(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = weight.scale.to(device, torch.float32).view(1, -1).contiguous()
        self.register_buffer("scale", scale, persistent=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)

    @property
    def packed_bytes(self) -> int:
        """Bytes on the device, scales and bias included."""
        held = [*self.parameters(), self.scale]
        return sum(each.numel() * each.element_size() for each in held)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        rows = x.reshape(-1, self.in_features).to(torch.float32)
        scale = self.rounder.scales(rows).expand(rows.shape[0], 1).contiguous()
        numbers = (rows / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        output = torch._scaled_mm(
            numbers, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=self.dtype
        )
        return output.view(*x.shape[:-1], self.out_features)


def why_not_fp8(
    weight: QuantizedWeight, rounder: InputRounder | None, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the scaled product can't compute this linear, or None."""
    kind = weight.scheme.kind
    rounding = None if rounder is None else rounder.rounding
    if kind.numbers != "float" or weight.scheme.bits != 8 or weight.scale.shape[1] != 1:
        return "its weights are not FP8 with a scale for each row"
    if rounding is None or rounding.numbers != "float" or rounding.bits != 8 or rounding.scope == "group":
        return "its inputs are not FP8 with a scale for each token or one for all"
    if any(size % MULTIPLE for size in weight.shape):
        return f"its sizes are no multiples of {MULTIPLE}"
    if dtype != torch.bfloat16:
        return f"it computes in {dtype}, not in bfloat16"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "the device has no products of FP8"
    return None
