"""PyTorch's packed operators for bfloat16 on the CPU: int4 with groups, int8 with a scale for each row.

2 and 3 bits go through the int4 operator. Above a measured number of rows weights are dequantized part by
part, since the operators decode them again for every four rows. Limits as found in torch 2.13: float16 and
float32 take scalar code in the int4 operator; the int8 operator crashes or is silently wrong unless
in_features is a multiple of 16, so channels are filled up. The int4 packing depends on the processor, so it
is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import check_bias, check_input
from kernels.layouts import unpack_rows
from kernels.operators import dequantize
from kernels.product import LinearProduct
from kernels.weight import PackedWeight

OPERATOR_GROUPS = (128, 64, 32)
OPERATOR_MIDPOINT = 8
ROW_MULTIPLE = 16  # out_features of the int4 operator
CHANNEL_MULTIPLE = 16  # in_features of the int8 operator
VECTORISED = ("AVX2", "AVX512")
# Rows from which dequantizing in PyTorch and a dense product win (tests/benchmarks/kernels.py).
INT4_CROSSOVER = 128
INT8_CROSSOVER = 16
PART_ROWS = 256  # of the weight, dequantized at once


class Int4Kernel:
    """The operator's packing, and the canonical tensors for many rows."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self.group: int = operator_group(weight.group_size, weight.in_features)
        q = unpack_rows(weight.qweight, weight.bits, weight.in_features)
        groups = weight.in_features // self.group
        scale = weight.scale.float().repeat_interleave(groups // weight.groups, dim=1)
        zero = torch.full_like(weight.scale, 2 ** (weight.bits - 1)) if weight.zero is None else weight.zero
        zero = zero.float().repeat_interleave(groups // weight.groups, dim=1)
        fill = -q.shape[0] % ROW_MULTIPLE
        q, scale, zero = (torch.nn.functional.pad(tensor, (0, 0, 0, fill)) for tensor in (q, scale, zero))
        # The operator computes (q - 8) * scale + offset.
        offset = (OPERATOR_MIDPOINT - zero) * scale
        self.scale_and_offset = torch.stack((scale, offset), dim=-1).transpose(0, 1).bfloat16().contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)

    @property
    def packed_bytes(self) -> int:
        operator: int = self.packed.numel() + 2 * self.scale_and_offset.numel()
        return self.weight.packed_bytes + operator

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight
        check_input(x, weight.in_features, torch.bfloat16, self.packed.device)
        check_bias(bias, weight.out_features, x)
        rows = x.reshape(-1, weight.in_features)
        if rows.shape[0] >= INT4_CROSSOVER:
            output = self.by_parts(rows)
        elif rows.shape[0]:
            output = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.contiguous(), self.packed, self.group, self.scale_and_offset
            )[:, : weight.out_features]
        else:
            output = x.new_empty(0, weight.out_features)
        return with_bias(output, bias).view(*x.shape[:-1], weight.out_features)

    def by_parts(self, rows: Tensor) -> Tensor:
        weight = self.weight
        output = rows.new_empty(rows.shape[0], weight.out_features)
        for first in range(0, weight.out_features, PART_ROWS):
            span = slice(first, first + PART_ROWS)
            zero = None if weight.zero is None else weight.zero[span]
            dense = dequantize(
                weight.qweight[span], weight.scale[span], zero, weight.bits, weight.group_size,
                weight.in_features, torch.bfloat16,
            )  # fmt: skip
            output[:, span] = torch.nn.functional.linear(rows, dense)
        return output


class Int8Kernel:
    """Signed codes with one scale for each row."""

    def __init__(self, weight: PackedWeight) -> None:
        self.in_features, self.out_features = weight.in_features, weight.out_features
        q = unpack_rows(weight.qweight, weight.bits, weight.in_features).to(torch.int16) - 128
        fill = -weight.in_features % CHANNEL_MULTIPLE
        self.codes = torch.nn.functional.pad(q.to(torch.int8), (0, fill))
        self.scale = weight.scale[:, 0].to(torch.bfloat16)

    @property
    def packed_bytes(self) -> int:
        return self.codes.numel() + 2 * self.scale.numel()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        check_input(x, self.in_features, torch.bfloat16, self.codes.device)
        check_bias(bias, self.out_features, x)
        rows = torch.nn.functional.pad(
            x.reshape(-1, self.in_features), (0, self.codes.shape[1] - self.in_features)
        )
        if rows.shape[0] >= INT8_CROSSOVER:
            output = self.by_parts(rows)
        elif rows.shape[0]:
            output = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.codes, self.scale)
        else:
            output = x.new_empty(0, self.out_features)
        return with_bias(output, bias).view(*x.shape[:-1], self.out_features)

    def by_parts(self, rows: Tensor) -> Tensor:
        output = rows.new_empty(rows.shape[0], self.out_features)
        for first in range(0, self.out_features, PART_ROWS):
            span = slice(first, first + PART_ROWS)
            dense = self.codes[span].to(torch.bfloat16)  # exact: eight bits
            output[:, span] = torch.nn.functional.linear(rows, dense) * self.scale[span]
        return output


class AtenBackend:
    name = "aten"

    def can_implement(self, problem: LinearProduct) -> str | None:
        """Why it can't, or None."""
        capability = torch.backends.cpu.get_cpu_capability()
        if capability not in VECTORISED:
            return f"PyTorch's packed operators are scalar code on this processor ({capability})"
        if problem.dtype != torch.bfloat16:
            return f"PyTorch's packed operators are vectorised for torch.bfloat16 only, not {problem.dtype}"
        if problem.bits == 8:
            if problem.group_size != -1 or problem.asymmetric:
                return "PyTorch's int8 operator has one scale for each row and no zero points"
            return None
        if not any(problem.in_features % group == 0 for group in OPERATOR_GROUPS):
            return f"PyTorch's int4 operator needs in_features in groups of 32, not {problem.in_features}"
        return None

    def prepare(
        self, weight: PackedWeight, dtype: torch.dtype, device: torch.device
    ) -> Int4Kernel | Int8Kernel:
        moved = weight.to(device)
        return Int8Kernel(moved) if weight.bits == 8 else Int4Kernel(moved)


def operator_group(group_size: int, in_features: int) -> int:
    """The operator's own group size: whole rows are cut into the largest groups that it knows."""
    if group_size != -1:
        return group_size
    return max(group for group in OPERATOR_GROUPS if in_features % group == 0)


def with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output.contiguous() if bias is None else output + bias
