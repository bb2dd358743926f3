"""The CUDA backend: fp16 and bf16 activations on Ampere and Hopper."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.checks import check_bias, check_input
from kernels.cuda.compiler import architecture_for, find_compiler
from kernels.cuda.driver import DriverError, open_driver
from kernels.cuda.layout import format_of
from kernels.cuda.linear import CHANNEL_MULTIPLE, linear, load_kernels, make_records
from kernels.product import LinearProduct
from kernels.weight import PackedWeight


class CudaKernel:
    """A weight as records on its device."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        self.form, self.dtype = format_of(weight), dtype
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.records = make_records(weight)
        load_kernels(weight, dtype, self.records.get_device())
        # Kernels read weights before the previous kernel on their stream has ended: these are complete.
        torch.cuda.synchronize(self.records.device)

    @property
    def packed_bytes(self) -> int:
        return self.records.numel()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        check_input(x, self.in_features, self.dtype, self.records.device)
        check_bias(bias, self.out_features, x)
        form = self.form
        if type(x) is Tensor and not torch.compiler.is_compiling():
            # Not through the dispatcher, whose way takes longer than the kernel of a small layer.
            return linear(x, self.records, bias, self.out_features, form)
        output: Tensor = torch.ops.nibble.cuda_linear(
            x,
            self.records,
            bias,
            self.out_features,
            form.bits,
            form.group_size,
            form.asymmetric,
            form.scale_dtype,
        )
        return output


class CudaBackend:
    name = "cuda"

    def can_implement(self, problem: LinearProduct) -> str | None:
        """Why it can't, or None."""
        if problem.device_type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {problem.device_type}"
        if problem.dtype == torch.float32:
            return "it computes in float16 or bfloat16, not in float32"
        if problem.in_features % CHANNEL_MULTIPLE:
            return f"in_features={problem.in_features} is no multiple of {CHANNEL_MULTIPLE}"
        if problem.capability is None or architecture_for(problem.capability) is None:
            return f"there is no machine code for compute capability {problem.capability}"
        return missing_tool()

    def prepare(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> CudaKernel:
        return CudaKernel(weight.to(device), dtype)


@functools.cache
def missing_tool() -> str | None:
    """The tool that this machine lacks, in words, or None."""
    try:
        open_driver()
    except DriverError as fault:
        return str(fault)
    if find_compiler() is None:
        return "no CUDA compiler: neither nvcc nor the NVRTC library was found"
    return None
