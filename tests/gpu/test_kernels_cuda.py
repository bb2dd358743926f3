"""The CUDA kernels beside the float64 reference: schemes, shapes, poisoned outputs, graphs, streams."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import fallbacks, layouts, operators, reference
from kernels.backend import select_backend
from kernels.cuda import packing
from kernels.cuda.backend import CudaBackend
from kernels.cuda.decode import SOURCE, DecodeKernel, device_of, make_plan
from kernels.cuda.layout import format_of
from kernels.cuda.layout import make_records as described_records
from kernels.cuda.library import shared_library
from kernels.cuda.linear import dense, kernels, make_records
from kernels.cuda.workspace import Workspace
from kernels.product import LinearProduct
from kernels.weight import PackedWeight
from tests.unit.kernels.weights import random_weight

GPU = torch.device("cuda", 0)
# Relative, in the Frobenius norm.
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
SCHEMES = [(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 128, -1)]
DECODE_TOKENS = (1, 2, 8, 9, 16, 31, 64)
WIDE_TOKENS = (1, 17, 64, 65, 130, 300)


@functools.cache
def weight_and_truth(
    rows: int, channels: int, bits: int, group: int, *, asymmetric: bool, scale_dtype: torch.dtype
) -> tuple[PackedWeight, Tensor]:
    weight = random_weight(
        rows, channels, bits=bits, group_size=group, asymmetric=asymmetric, scale_dtype=scale_dtype, seed=bits
    )
    return weight.to(GPU), reference.dequantize(weight).to(GPU)


def relative_error(output: Tensor, x: Tensor, truth: Tensor, bias: Tensor | None) -> float:
    """Of the size that such a product has: the one sum of a single row may cancel to nearly nothing."""
    expected = x.double() @ truth.T
    size = x.double().norm() * truth.norm() / truth.shape[1] ** 0.5
    if bias is not None:
        expected += bias.double()
    return float((output.double() - expected).norm() / torch.maximum(expected.norm(), size))


def check_product(kernel: Any, weight: PackedWeight, truth: Tensor, tokens: int, dtype: torch.dtype) -> None:
    """Fresh random input, an output full of NaN, with and without bias, and the same bits twice."""
    rows, channels = truth.shape
    records, form = make_records(weight), format_of(weight)
    torch.cuda.synchronize()
    x = torch.randn(tokens, channels, device=GPU, dtype=dtype)
    for bias in (None, torch.randn(rows, device=GPU, dtype=dtype)):
        outputs = [torch.full((tokens, rows), torch.nan, device=GPU, dtype=dtype) for _ in range(2)]
        for output in outputs:
            kernel(x, records, bias, output, form)
        assert relative_error(outputs[0], x, truth, bias) < TOLERANCES[dtype]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_every_scheme(bits: int, group: int, asymmetric: bool) -> None:
    """Both dtypes in turn: they share everything but the magic numbers, which both parities of zero meet."""
    dtype = torch.float16 if (group in (32, -1)) == asymmetric else torch.bfloat16
    scale_dtype = {32: torch.float32, 64: torch.bfloat16, 128: torch.float16, -1: dtype}[group]
    weight, truth = weight_and_truth(200, 640, bits, group, asymmetric=asymmetric, scale_dtype=scale_dtype)
    assert torch.equal(make_records(weight), described_records(weight))
    found = dense(make_records(weight), 200, 640, format_of(weight), dtype)
    assert float((found.double() - truth).norm() / truth.norm()) < TOLERANCES[dtype]
    for tokens in (1, 16):
        check_product(kernels().decode, weight, truth, tokens, dtype)
    check_product(kernels().wide, weight, truth, 65, dtype)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_number_of_bits_in_both_dtypes(bits: int, dtype: torch.dtype, asymmetric: bool) -> None:
    weight, truth = weight_and_truth(100, 256, bits, 128, asymmetric=asymmetric, scale_dtype=torch.float16)
    check_product(kernels().decode, weight, truth, 3, dtype)
    check_product(kernels().wide, weight, truth, 30, dtype)


@pytest.mark.parametrize(
    ("rows", "channels", "group"), [(1, 32, 32), (15, 8, -1), (17, 136, -1), (1000, 96, 32), (130, 2080, 32)]
)
def test_ragged_shapes(rows: int, channels: int, group: int) -> None:
    weight, truth = weight_and_truth(rows, channels, 4, group, asymmetric=True, scale_dtype=torch.bfloat16)
    for tokens in DECODE_TOKENS:
        check_product(kernels().decode, weight, truth, tokens, torch.bfloat16)
    for tokens in WIDE_TOKENS:
        check_product(kernels().wide, weight, truth, tokens, torch.bfloat16)


@pytest.mark.parametrize("tokens", DECODE_TOKENS)
def test_the_path_of_ampere(tokens: int) -> None:
    """Without the copy engine: what sm_80 compiles, run here."""
    weight, truth = weight_and_truth(200, 640, 4, 128, asymmetric=True, scale_dtype=torch.float16)
    form = format_of(weight)
    kernel = DecodeKernel(shared_library(), Workspace())
    plan = make_plan(tokens, 200, 640, form, device_of(0))
    defines = {**plan.shape.defines(form, torch.float16), "BULK": 0, "BULK_TOKENS": 0}
    function = shared_library().function(SOURCE, "decode", 0, defines)
    prepared = replace(kernel.prepare_plan(plan, 200, form, torch.float16, 0), function=function)

    def run(x: Tensor, records: Tensor, bias: Tensor | None, output: Tensor, _: object) -> None:
        kernel.launch(prepared, x, records, bias, output)

    check_product(run, weight, truth, tokens, torch.float16)


@pytest.fixture(scope="module")
def kernel() -> Any:
    weight, _ = weight_and_truth(1024, 4096, 4, 128, asymmetric=False, scale_dtype=torch.bfloat16)
    return CudaBackend().prepare(weight, torch.bfloat16, GPU)


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return weight_and_truth(1024, 4096, 4, 128, asymmetric=False, scale_dtype=torch.bfloat16)[1]


@pytest.mark.parametrize("tokens", [1, 7, 40, 200])
def test_input_of_any_strides_and_offset(kernel: Any, truth: Tensor, tokens: int) -> None:
    memory = torch.randn(tokens * 4096 * 2 + 3, device=GPU, dtype=torch.bfloat16)
    offset = memory[3 : 3 + tokens * 4096].view(tokens, 4096)
    strided = memory[: tokens * 8192].view(tokens, 8192)[:, ::2]
    for x in (offset, strided, offset.view(1, tokens, 4096)):
        output = kernel(x, None)
        assert output.shape == (*x.shape[:-1], 1024)
        assert relative_error(output.view(tokens, 1024), x.reshape(tokens, 4096), truth, None) < 5e-3


def test_no_tokens(kernel: Any) -> None:
    assert kernel(torch.empty(2, 0, 4096, device=GPU, dtype=torch.bfloat16), None).shape == (2, 0, 1024)


@pytest.mark.parametrize("tokens", [1, 16, 32, 100])
def test_a_graph_computes_on_new_input(kernel: Any, truth: Tensor, tokens: int) -> None:
    x = torch.randn(tokens, 4096, device=GPU, dtype=torch.bfloat16)
    kernel(x, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [kernel(x, None) for _ in range(3)]
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        for output in outputs:
            assert relative_error(output, x, truth, None) < 5e-3


def test_two_streams_do_not_share_partial_sums(kernel: Any, truth: Tensor) -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [torch.randn(3, 4096, device=GPU, dtype=torch.bfloat16) for _ in streams]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, x, found in zip(streams, inputs, outputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(kernel(x, None))
    torch.cuda.synchronize()
    for x, found in zip(inputs, outputs, strict=True):
        assert all(torch.equal(output, found[0]) for output in found)
        assert relative_error(found[0], x, truth, None) < 5e-3


def test_the_operator_passes_opcheck(kernel: Any) -> None:
    form = kernel.form
    for tokens in (1, 20):
        x = torch.randn(tokens, 4096, device=GPU, dtype=torch.bfloat16)
        arguments = (
            x, kernel.records, None, 1024, form.bits, form.group_size, form.asymmetric, form.scale_dtype,
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.nibble.cuda_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_it_is_the_first_choice_on_this_gpu() -> None:
    weight, _ = weight_and_truth(200, 640, 4, 128, asymmetric=True, scale_dtype=torch.float16)
    selection = select_backend(LinearProduct.of(weight, torch.bfloat16, GPU))
    assert (selection.backend.name, selection.refusals) == ("cuda", ())


def test_wrong_input_is_refused_before_a_launch(kernel: Any) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(1, 4095\); allowed: \(\.\.\., 4096\)"):
        kernel(torch.zeros(1, 4095, device=GPU, dtype=torch.bfloat16), None)
    with pytest.raises(TypeError, match=r"x is torch.float16; allowed: torch.bfloat16"):
        kernel(torch.zeros(1, 4096, device=GPU, dtype=torch.float16), None)
    with pytest.raises(ValueError, match=r"x is on cpu; allowed: cuda:0"):
        kernel(torch.zeros(1, 4096, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); allowed: \(1024,\)"):
        kernel(
            torch.zeros(1, 4096, device=GPU, dtype=torch.bfloat16),
            torch.zeros(4, device=GPU, dtype=torch.bfloat16),
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_that_of_the_cpu(bits: int) -> None:
    values = torch.randint(0, 2**bits, (33, 264), dtype=torch.uint8)
    packed = operators.pack(values.to(GPU), bits)
    assert torch.equal(packed.cpu(), layouts.pack_rows(values, bits))
    assert torch.equal(operators.unpack(packed, bits, 264).cpu(), values)
    down = operators.pack(values.T.contiguous().to(GPU), bits, down=True)
    assert torch.equal(down.cpu(), layouts.pack_gptq(values.T.contiguous(), bits))
    assert torch.equal(operators.unpack(down, bits, 264, down=True).cpu(), values.T)
    assert fallbacks.noted() == ()
    with pytest.raises(ValueError, match=f"value {2**bits - 1} does not fit {bits - 1} bits"):
        packing.pack(torch.full((1, 8), 2**bits - 1, dtype=torch.uint8, device=GPU), bits - 1)


def test_awq_packing_is_that_of_the_cpu() -> None:
    values = torch.randint(0, 16, (33, 264), dtype=torch.uint8)
    packed = operators.pack(values.to(GPU), 4, interleaved=True)
    assert torch.equal(packed.cpu(), layouts.pack_awq(values))
    assert torch.equal(operators.unpack(packed, 4, 264, interleaved=True).cpu(), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_dequantizing_is_that_of_the_cpu(bits: int, group: int, dtype: torch.dtype) -> None:
    channels = 7 if group == -1 else 128
    weight = random_weight(9, channels, bits=bits, group_size=group, asymmetric=True)
    on_gpu = weight.to(GPU)
    found = operators.dequantize(on_gpu.qweight, on_gpu.scale, on_gpu.zero, bits, group, channels, dtype)
    expected = operators.dequantize(weight.qweight, weight.scale, weight.zero, bits, group, channels, dtype)
    assert torch.equal(found.cpu(), expected)
