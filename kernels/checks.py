"""Checks of arguments before anything is computed; errors name argument, value and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layouts import packed_words

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, -1)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        raise TypeError(f"{name} is {dtype}; allowed: {', '.join(map(str, allowed))}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {expected}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; allowed: those of a contiguous tensor")


def check_scheme(bits: int, group_size: int, in_features: int) -> int:
    """The number of groups in a row."""
    check_one_of("bits", bits, BITS)
    check_one_of("group_size", group_size, GROUP_SIZES)
    if in_features < 1:
        raise ValueError(f"in_features={in_features}; allowed: 1 and more")
    if group_size == -1:
        return 1
    if in_features % group_size:
        raise ValueError(f"in_features={in_features}; allowed: multiples of group_size={group_size}")
    return in_features // group_size


def check_packed(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, in_features: int
) -> None:
    """The canonical tensors of a linear (kernels/weight.py)."""
    groups = check_scheme(bits, group_size, in_features)
    check_dtype("qweight", qweight.dtype, (torch.int32,))
    check_dtype("scale", scale.dtype, DTYPES)
    if qweight.dim() != 2:
        raise ValueError(f"qweight has {qweight.dim()} dimensions; allowed: 2")
    out_features = qweight.shape[0]
    check_shape("qweight", qweight, (out_features, packed_words(in_features, bits)))
    check_shape("scale", scale, (out_features, groups))
    check_device("scale", scale, qweight.device)
    check_contiguous("qweight", qweight)
    check_contiguous("scale", scale)
    if zero is not None:
        check_dtype("zero", zero.dtype, (torch.uint8,))
        check_shape("zero", zero, (out_features, groups))
        check_device("zero", zero, qweight.device)
        check_contiguous("zero", zero)


def check_input(x: Tensor, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
    """Checks the input of a linear: any strides, any leading dimensions."""
    check_dtype("x", x.dtype, (dtype,))
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (..., {in_features})")
    check_device("x", x, device)


def check_bias(bias: Tensor | None, out_features: int, x: Tensor) -> None:
    if bias is not None:
        check_dtype("bias", bias.dtype, (x.dtype,))
        check_shape("bias", bias, (out_features,))
        check_device("bias", bias, x.device)
