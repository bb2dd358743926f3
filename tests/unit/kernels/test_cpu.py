"""The CPU's backends against float64, on every shape that is hard."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu import native, vector_backend, whole_decoder
from kernels.cpu.blocked_layout import CHUNK, LANE_ORDER, ROWS, WORDS, to_blocks
from kernels.cpu.native import NativeBackend
from kernels.cpu.vector_backend import VectorKernel
from kernels.layouts import pack_rows, unpack_rows
from kernels.weight import PackedWeight
from tests.unit.kernels.cpu_kernels import BACKENDS, kernel_of, problem_of
from tests.unit.kernels.weights import TOLERANCES, assert_close, random_input, random_weight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["amx", "vector"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([32, 64, 128, -1]),
    groups=st.integers(1, 5),
    out_features=st.integers(1, 150),
    rows=st.sampled_from([0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 70]),
    asymmetric=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
)
def test_our_own_kernels_compute_the_product(
    name: str, bits: int, group: int, groups: int, out_features: int, rows: int, asymmetric: bool,
    biased: bool, dtype: torch.dtype, scale_dtype: torch.dtype,
) -> None:  # fmt: skip
    in_features = groups * 37 if group == -1 else groups * group
    weight = random_weight(
        out_features, in_features, bits=bits, group_size=group, asymmetric=asymmetric, scale_dtype=scale_dtype
    )
    x = random_input((rows, in_features), dtype)
    bias = random_input((out_features,), dtype) if biased else None
    assert_close(kernel_of(name, weight, dtype)(x, bias), x, weight, bias)


@pytest.mark.parametrize("rows", [0, 1, 5, 40, 200])
@pytest.mark.parametrize(
    ("bits", "group", "in_features", "asymmetric"),
    [
        (4, 128, 256, True), (4, 32, 96, False), (3, 64, 192, True), (2, -1, 320, False), (8, -1, 40, False),
        (8, -1, 100, False), (8, -1, 112, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("biased", [False, True])
def test_torchs_operators_compute_the_product(
    bits: int, group: int, in_features: int, asymmetric: bool, rows: int, biased: bool
) -> None:
    """40 and 100 channels of 8 bits are where the operator itself is wrong and crashes."""
    weight = random_weight(40, in_features, bits=bits, group_size=group, asymmetric=asymmetric)
    x = random_input((rows, in_features), torch.bfloat16)
    bias = random_input((40,), torch.bfloat16) if biased else None
    assert_close(kernel_of("aten", weight, torch.bfloat16)(x, bias), x, weight, bias)


@pytest.mark.parametrize("name", BACKENDS)
def test_inputs_of_any_strides_and_dimensions(name: str) -> None:
    weight = random_weight(48, 256, asymmetric=True)
    kernel = kernel_of(name, weight, torch.bfloat16)
    whole = random_input((6, 600), torch.bfloat16)
    for x in (
        whole[:, 3:259],  # an offset, and longer rows
        whole[:, :512:2],  # every second channel
        whole.T[:256].T,
        random_input((256, 6), torch.bfloat16).T,  # transposed
        whole[:1, :256].expand(4, 256),
        whole[:, :256].reshape(3, 2, 256),
        whole[0, :256],
    ):
        assert_close(kernel(x, None), x, weight, None)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_smallest_layers(name: str) -> None:
    for group, in_features in ((32, 32), (-1, 32), (-1, 1)):
        weight = random_weight(1, in_features, group_size=group)
        if name == "aten" and in_features == 1:
            continue
        kernel = kernel_of(name, weight, torch.bfloat16)
        for rows in (1, 2, 40):
            x = random_input((rows, in_features), torch.bfloat16)
            assert_close(kernel(x, None), x, weight, None)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_every_output_is_written(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was not written would show: it is filled with NaN."""
    weight = random_weight(70, 160, group_size=32, asymmetric=True)
    kernel = kernel_of(name, weight, torch.bfloat16)
    x = random_input((rows, 160), torch.bfloat16)
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        found = empty(*size, **options)  # type: ignore[call-overload]
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **o: poisoned(*size, dtype=x.dtype, **o))
    assert bool(torch.isfinite(kernel(x, None)).all())


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_leaks_between_rows(name: str) -> None:
    """A row of NaN gives a row of NaN, and leaves the others as they are."""
    weight = random_weight(48, 256)
    kernel = kernel_of(name, weight, torch.bfloat16)
    x = random_input((35, 256), torch.bfloat16)
    expected = kernel(x, None)
    x[4] = float("nan")
    output = kernel(x, None)
    assert bool(output[4].isnan().all())
    others = [row for row in range(35) if row != 4]
    assert torch.equal(output[others], expected[others])


@pytest.mark.parametrize("name", ["amx", "vector"])
def test_more_threads_give_the_same_bits(name: str) -> None:
    weight = random_weight(300, 512, asymmetric=True)
    kernel = kernel_of(name, weight, torch.bfloat16)
    for rows in (1, 16, 70, 600):
        x = random_input((rows, 512), torch.bfloat16)
        torch.set_num_threads(1)
        one = kernel(x, None)
        torch.set_num_threads(3)
        assert torch.equal(kernel(x, None), one)


@pytest.mark.parametrize("name", ["amx", "vector"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 64), (4, 32), (4, -1), (8, 128), (8, 32), (2, 64)])
def test_a_few_rows_are_summed_exactly(name: str, bits: int, group: int) -> None:
    """Integers that float32 holds in all their sums: any wrong digit would show."""
    q = random_weight(20, 256, bits=bits, group_size=group, asymmetric=True)
    weight = PackedWeight(q.qweight, torch.ones_like(q.scale), q.zero, bits, group, 256)
    x = torch.randint(-8, 8, (3, 256), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = torch.tensor([2.0**14, 3.0, 0.0])  # beside the first, the others have lower digits only
    x[:, 128:256] *= torch.tensor([[0.0], [0.5], [1.0]])
    kernel = kernel_of(name, weight, torch.float32)
    output = torch.cat([kernel(row, None) for row in x.split(1)])
    assert torch.equal(output.double(), reference.quantized_linear(x, weight, None))


@pytest.mark.parametrize("name", ["amx", "vector"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_channels_of_very_different_sizes(name: str, dtype: torch.dtype) -> None:
    weight = random_weight(20, 256, asymmetric=True)
    kernel = kernel_of(name, weight, dtype)
    exponents = torch.stack(
        [torch.linspace(-30, 30, 256), torch.linspace(30, -30, 256), torch.full((256,), -60.0)]
    )
    x = (random_input((3, 256), torch.float32) * 2.0**exponents).to(dtype)
    expected = reference.quantized_linear(x, weight, None)
    for output in (kernel(x, None), torch.cat([kernel(row, None) for row in x.split(1)])):
        error = (output.double() - expected).abs().amax(1) / expected.abs().amax(1)
        assert float(error.max()) < TOLERANCES[dtype]


@pytest.mark.parametrize("name", ["amx", "vector"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e-30, 0.0])
def test_inputs_that_have_no_digits(name: str, value: float) -> None:
    weight = random_weight(20, 128, asymmetric=True)
    kernel = kernel_of(name, weight, torch.bfloat16)
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 100] = value
    output, expected = kernel(x, None).double(), reference.quantized_linear(x, weight, None)
    if name == "vector" and math.isinf(value) and vector_backend.reads_lanes():
        # An infinite chunk has no integers, whatever the weights.
        assert bool(output.isnan().all())
    else:
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    if reason := NativeBackend().can_implement(problem_of(random_weight(16, 128), dtype)):
        pytest.skip(reason)
    weight = to_blocks(random_weight(24, 128, bits=3, group_size=64, asymmetric=True))
    for rows in (1, 20):
        x, bias = random_input((rows, 128), dtype), random_input((24,), dtype)
        arguments = (x, weight.codes, weight.scale, weight.zero, bias, 3, 64, 24)
        torch.library.opcheck(torch.ops.nibble.blocked_linear.default, arguments)


def test_tiles_leave_other_libraries_alone() -> None:
    """oneDNN keeps tile shapes of its own for each thread."""
    weight = random_weight(64, 256)
    kernel = kernel_of("amx", weight, torch.bfloat16)
    dense, x = random_input((64, 256), torch.bfloat16), random_input((48, 256), torch.bfloat16)
    expected = torch.nn.functional.linear(x, dense)
    for _ in range(3):
        kernel(x, None)
        assert torch.equal(torch.nn.functional.linear(x, dense), expected)


def test_blocks_hold_each_code_where_the_kernel_looks_for_it() -> None:
    weight = random_weight(70, 200, bits=8, group_size=-1)
    q = torch.nn.functional.pad(unpack_rows(weight.qweight, 8, 200), (0, 56, 0, 58))
    codes = to_blocks(weight).codes
    assert tuple(codes.shape) == (128 // ROWS, 256 // CHUNK, ROWS, 2, 2 * WORDS)
    for row, channel in ((0, 0), (17, 31), (69, 199), (3, 64), (33, 130), (100, 255)):
        quarter, word = divmod(channel % CHUNK, WORDS)
        place = codes[row // ROWS, channel // CHUNK, row % ROWS]
        words = [int(place[plane, 2 * word]) | int(place[plane, 2 * word + 1]) << 8 for plane in (0, 1)]
        low, high = ((each >> 4 * quarter) & 15 for each in words)
        assert low | high << 4 == int(q[row, channel])


def test_packed_bytes_are_what_a_weight_takes() -> None:
    weight = random_weight(64, 256, asymmetric=True)
    assert to_blocks(weight).packed_bytes == weight.packed_bytes
    assert to_blocks(random_weight(64, 256, bits=2)).packed_bytes == 64 * 128 + 2 * 128  # 4 bits for each


@pytest.mark.parametrize("bits", [4, 8])
def test_lanes_hold_each_code_where_the_kernel_looks_for_it(bits: int) -> None:
    weight = random_weight(70, 200, bits=bits, group_size=-1)
    q = torch.nn.functional.pad(unpack_rows(weight.qweight, bits, 200), (0, 56, 0, 58))
    codes = to_blocks(weight, in_lanes=True).codes
    assert codes.shape == to_blocks(weight).codes.shape
    for row, channel in ((0, 0), (17, 31), (69, 199), (3, 64), (33, 130), (100, 255)):
        chunk, within = divmod(channel, CHUNK)
        quarter, four = divmod(within, WORDS)
        entry, place = 8 * (quarter // 2) + four // 4, 4 * (row % ROWS) + LANE_ORDER.index(four % 4)
        digits = [int(codes[row // ROWS, chunk, entry, plane, place]) for plane in range(codes.shape[3])]
        code = sum((digit >> 4 * (quarter % 2) & 15) << 4 * plane for plane, digit in enumerate(digits))
        assert code == int(q[row, channel])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 64), (3, 32), (4, -1), (8, 128)])
def test_what_a_row_gives_does_not_depend_on_the_others(bits: int, group: int, dtype: torch.dtype) -> None:
    """Nor on the number of threads, nor on how codes lie; beside rows that need a third digit or not."""
    weight = random_weight(100, 384, bits=bits, group_size=group, asymmetric=True)
    x = random_input((70, 384), torch.float32)
    x[::3, 5] *= 2000.0  # beside it, bfloat16 keeps more of the others than integers of 16 bits
    x = x.to(dtype)
    kernel = kernel_of("vector", weight, dtype)
    alone = torch.cat([kernel(row, None) for row in x.split(1)])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for count in (2, 4, 7, 64, 70):
            assert torch.equal(kernel(x[:count], None), alone[:count])
    assert torch.equal(VectorKernel(to_blocks(weight), dtype)(x, None), alone)


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library as it is compiled for processors that don't multiply bytes."""
    sources = whole_decoder.DECODER
    without = replace(sources, flags=(*sources.flags, "-mno-avx512vnni"))
    monkeypatch.setattr(whole_decoder, "DECODER", without)
    monkeypatch.setattr(vector_backend, "reads_lanes", lambda: False)
    whole_decoder.decoder_library.cache_clear()
    yield
    whole_decoder.decoder_library.cache_clear()


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_vnni_weights_are_decoded_in_registers(dtype: torch.dtype) -> None:
    for bits, group in ((4, 128), (4, 64), (3, 32), (4, -1), (8, 128)):
        weight = random_weight(100, 384, bits=bits, group_size=group, asymmetric=True)
        kernel = kernel_of("vector", weight, dtype)
        assert isinstance(kernel, VectorKernel)
        assert not kernel.weight.in_lanes
        x = random_input((21, 384), dtype)
        output = kernel(x, None)
        assert_close(output, x, weight, None)
        assert torch.equal(torch.cat([kernel(row, None) for row in x.split(1)]), output)


@pytest.mark.parametrize("size", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_beside_an_outlier_the_others_keep_their_digits(size: float, dtype: torch.dtype) -> None:
    """The outlier meets weights of zero, so all that the output shows is what became of the others."""
    q = random_weight(64, 256, group_size=128)
    codes = unpack_rows(q.qweight, 4, 256)
    codes[:, 7] = 8
    weight = PackedWeight(pack_rows(codes, 4), q.scale, None, 4, 128, 256)
    x = random_input((8, 256), dtype)
    x[:, 7] = size
    output = kernel_of("vector", weight, dtype)(x, None).double()
    expected = reference.quantized_linear(x, weight, None)
    error = float((output - expected).abs().amax() / expected.abs().amax())
    assert error < (TOLERANCES[dtype] if size <= 100 else max(TOLERANCES[dtype], 1e-3))  # of 24 bits in all


@pytest.mark.parametrize("name", ["amx", "vector"])
def test_many_rows_are_multiplied_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MOST_ROWS", 20)
    weight = random_weight(48, 256)
    for dtype in (torch.bfloat16, torch.float32):
        x = random_input((3, 17, 256), dtype)
        assert_close(kernel_of(name, weight, dtype)(x, None), x, weight, None)


@pytest.mark.parametrize("name", ["amx", "vector"])
def test_a_copied_kernel_has_a_weight_of_its_own(name: str) -> None:
    kernel = kernel_of(name, random_weight(16, 128), torch.bfloat16)
    x = random_input((1, 128), torch.bfloat16)
    copied, expected = copy.deepcopy(kernel), kernel(x, None)
    assert isinstance(kernel, native.NativeKernel | VectorKernel)
    kernel.weight.codes.zero_()
    assert not torch.equal(kernel(x, None), expected)
    assert torch.equal(copied(x, None), expected)


def test_the_operator_and_the_kernel_agree() -> None:
    kernel = kernel_of("amx", random_weight(40, 256, asymmetric=True), torch.bfloat16)
    assert isinstance(kernel, native.NativeKernel)
    weight = kernel.weight
    for rows in (1, 3, 20):
        x, bias = random_input((rows, 256), torch.bfloat16), random_input((40,), torch.bfloat16)
        output = torch.ops.nibble.blocked_linear(x, weight.codes, weight.scale, weight.zero, bias, 4, 128, 40)
        assert torch.equal(output, kernel(x, bias))
