"""A linear of a served model: computes from packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.backend import AUTO, Selection, select_backend
from kernels.checks import check_bias
from kernels.product import LinearProduct
from kernels.weight import PackedWeight
from workers.modeling.input_rounding import InputRounder


class QuantizedLinear(nn.Module):
    """Replaces an nn.Linear. The weight lies on `device` in the layout of the selected backend.

    It is repacked when it is built, so it can't move to another device or dtype afterwards: build it there.
    """

    bias: Tensor | None
    rounder: InputRounder | None = None  # of its input, before it is multiplied

    def __init__(
        self,
        weight: PackedWeight,
        selection: Selection,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size, self.dtype, self.device = weight.bits, weight.group_size, dtype, device
        self.selection = selection
        self.kernel = selection.backend.prepare(weight, dtype, device)
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))
        check_bias(self.bias, self.out_features, torch.empty(0, dtype=dtype, device=device))

    @property
    def packed_bytes(self) -> int:
        """Bytes on the device, bias included."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.kernel.packed_bytes + bias

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x if self.rounder is None else self.rounder(x), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, "
            f"backend={self.selection.backend.name}"
        )


def quantized_linear(
    weight: PackedWeight,
    *,
    dtype: torch.dtype,
    device: torch.device,
    bias: Tensor | None = None,
    requested: str = AUTO,
) -> QuantizedLinear:
    """`weight` as a module on `device`, by the backend that is selected there.

    Raises ValueError if the backend `requested` can't.
    """
    selection = select_backend(LinearProduct.of(weight, dtype, device), requested)
    return QuantizedLinear(weight, selection, dtype=dtype, device=device, bias=bias)
