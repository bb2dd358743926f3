"""The CPU's backends against float64, on every shape that is hard."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.backend import Kernel, select_backend
from kernels.cpu import native, native_library
from kernels.cpu.blocked_layout import CHUNK, ROWS, WORDS, to_blocks
from kernels.cpu.native import NativeBackend
from kernels.cpu.native_library import NotCompiled, compiled, processor
from kernels.layouts import unpack_rows
from kernels.problem import Problem
from kernels.weight import PackedWeight
from tests.unit.kernels.weights import TOLERANCES, assert_close, random_input, random_weight

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BACKENDS = ["amx", "avx512", "aten", "torch"]


def problem_of(weight: PackedWeight, dtype: torch.dtype) -> Problem:
    return Problem.of(weight, dtype, CPU)


def kernel_of(name: str, weight: PackedWeight, dtype: torch.dtype) -> Kernel:
    """The backend's kernel; skips where this machine or the backend can't."""
    try:
        selection = select_backend(problem_of(weight, dtype), name)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    return selection.backend.prepare(weight, dtype, CPU)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["amx", "avx512"])
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


@pytest.mark.parametrize("name", ["amx", "avx512"])
def test_more_threads_give_the_same_bits(name: str) -> None:
    weight = random_weight(300, 512, asymmetric=True)
    kernel = kernel_of(name, weight, torch.bfloat16)
    for rows in (1, 16, 70, 600):
        if name == "avx512" and rows >= native.DEQUANTIZED_ROWS:
            continue  # PyTorch's product, whose sums depend on its threads
        x = random_input((rows, 512), torch.bfloat16)
        torch.set_num_threads(1)
        one = kernel(x, None)
        torch.set_num_threads(3)
        assert torch.equal(kernel(x, None), one)


@pytest.mark.parametrize("name", ["amx", "avx512"])
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


@pytest.mark.parametrize("name", ["amx", "avx512"])
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


@pytest.mark.parametrize("name", ["amx", "avx512"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e-30, 0.0])
def test_inputs_that_have_no_digits(name: str, value: float) -> None:
    weight = random_weight(20, 128, asymmetric=True)
    kernel = kernel_of(name, weight, torch.bfloat16)
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 100] = value
    expected = reference.quantized_linear(x, weight, None)
    torch.testing.assert_close(kernel(x, None).double(), expected, rtol=1e-2, atol=0, equal_nan=True)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, *, tiles: bool) -> None:
    if reason := NativeBackend(tiles=tiles).can_implement(problem_of(random_weight(16, 128), dtype)):
        pytest.skip(reason)
    weight = to_blocks(random_weight(24, 128, bits=3, group_size=64, asymmetric=True))
    for rows in (1, 20):
        x, bias = random_input((rows, 128), dtype), random_input((24,), dtype)
        arguments = (x, weight.codes, weight.scale, weight.zero, bias, 3, 64, 24, tiles)
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


def test_a_processor_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "processor", lambda: ("Old One", frozenset({"avx512f"})))
    native_library.library_or_reason.cache_clear()
    try:
        weight = random_weight(16, 128)
        selection = select_backend(problem_of(weight, torch.bfloat16))
        assert selection.backend.name in {"aten", "torch"}
        assert selection.refusals[1][1] == (
            "the processor (Old One) lacks avx512_bf16, avx512_vnni, avx512bw, avx512dq, avx512vl"
        )
        with pytest.raises(ValueError, match=r"'amx' can't compute .*Old One.* lacks amx_bf16"):
            select_backend(problem_of(weight, torch.bfloat16), "amx")
    finally:
        native_library.library_or_reason.cache_clear()


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotCompiled, match=r"no C\+\+ compiler on PATH: none of g\+\+, clang\+\+"):
        compiled(tmp_path, tiles=False)


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    script = "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.cpp:1: error: no such thing' >&2\nexit 4\n"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotCompiled, match=r"failed with 4: x\.cpp:1: error: no such thing"):
        compiled(tmp_path / "cache", tiles=False)
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_failure_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(folder: Path, *, tiles: bool, sources: native_library.Sources) -> Path:
        tries.append(folder)
        raise NotCompiled("out of luck")

    monkeypatch.setattr(native_library, "compiled", fail)
    native_library.library_or_reason.cache_clear()
    try:
        backend = NativeBackend(tiles=False)
        problem = problem_of(random_weight(16, 128), torch.bfloat16)
        first = backend.can_implement(problem)
        assert backend.can_implement(problem) == first
        if "lacks" not in str(first):
            assert (first, len(tries)) == ("out of luck", 1)
    finally:
        native_library.library_or_reason.cache_clear()


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NotCompiled, match="no place for compiled kernels"):
        native_library.default_folder()


@pytest.mark.parametrize("name", ["amx", "avx512"])
def test_many_rows_are_multiplied_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MOST_ROWS", 20)
    weight = random_weight(48, 256)
    for dtype in (torch.bfloat16, torch.float32):
        x = random_input((3, 17, 256), dtype)
        assert_close(kernel_of(name, weight, dtype)(x, None), x, weight, None)


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def write(command: list[str]) -> None:
        commands.append(command)
        Path(command[-1]).write_bytes(b"library")

    monkeypatch.setattr(native_library, "run_compiler", write)
    first = compiled(tmp_path, tiles=True)
    assert compiled(tmp_path, tiles=True) == first
    assert compiled(tmp_path, tiles=False) != first
    assert len(commands) == 2
    monkeypatch.setattr(native_library, "processor", lambda: ("Another", frozenset()))
    assert compiled(tmp_path, tiles=True) != first


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotCompiled, match="the folder of compiled kernels can't be used"):
        compiled(tmp_path / "file" / "cache", tiles=False)


def test_scalar_operators_are_refused() -> None:
    weight = random_weight(16, 128)
    with pytest.raises(ValueError, match=r"vectorised for torch.bfloat16 only, not torch.float16"):
        select_backend(problem_of(weight, torch.float16), "aten")
    grouped = random_weight(16, 128, bits=8, group_size=64)
    with pytest.raises(ValueError, match="one scale for each row"):
        select_backend(problem_of(grouped, torch.bfloat16), "aten")


@pytest.mark.parametrize("name", BACKENDS)
def test_bad_inputs_are_named(name: str) -> None:
    kernel = kernel_of(name, random_weight(16, 128), torch.bfloat16)
    x = random_input((2, 128), torch.bfloat16)
    with pytest.raises(TypeError, match=r"x is torch.float32; allowed: torch.bfloat16"):
        kernel(x.float(), None)
    with pytest.raises(ValueError, match=r"x has shape \(2, 64\); allowed: \(..., 128\)"):
        kernel(x[:, :64], None)
    with pytest.raises(ValueError, match="x is on meta; allowed: cpu"):
        kernel(x.to("meta"), None)
    with pytest.raises(ValueError, match=r"bias has shape \(15,\); allowed: \(16,\)"):
        kernel(x, torch.zeros(15, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"bias is torch.float32; allowed: torch.bfloat16"):
        kernel(x, torch.zeros(16))


BLOCKS = to_blocks(random_weight(70, 200, group_size=-1, asymmetric=True))
BLOCKED = {
    "x": random_input((2, 200), torch.float32), "codes": BLOCKS.codes, "scale": BLOCKS.scale,
    "zero": BLOCKS.zero, "bias": None, "bits": 4, "group_size": -1, "out_features": 70, "tiles": False,
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random_input((2, 257), torch.float32)}, r"codes has shape .*; allowed: \(8, 3, 16, 1, 64\)"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        ({"x": random_input((2, 200), torch.float64)}, "x is torch.float64"),
        ({"codes": BLOCKS.codes.int()}, "codes is torch.int32; allowed: torch.uint8"),
        ({"codes": BLOCKS.codes.transpose(0, 1).contiguous().transpose(0, 1)}, "codes has strides"),
        ({"scale": BLOCKS.scale[:4]}, r"scale has shape \(4, 1, 16\); allowed: \(8, 1, 16\)"),
        ({"zero": BLOCKS.scale}, "zero is torch.float16; allowed: torch.uint8"),
        ({"bits": 8}, r"codes has shape .*; allowed: \(8, 2, 16, 2, 64\)"),
        ({"bits": 5}, "bits=5; allowed: 2, 3, 4, 8"),
        ({"group_size": 64}, r"scale has shape \(8, 1, 16\); allowed: \(8, 4, 16\)"),
        ({"group_size": 16}, "group_size=16; allowed: 32, 64, 128, -1"),
        ({"out_features": 129}, r"codes has shape .*; allowed: \(12, 2, 16, 1, 64\)"),
        ({"out_features": 0}, "out_features=0; allowed: 1 and more"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); allowed: \(70,\)"),
    ],
)
def test_bad_arguments_of_the_operator_are_named(
    change: dict[str, object], message: str, device: str
) -> None:
    """Before the library reads a byte, and while PyTorch compiles."""
    arguments = {**BLOCKED, **change}.values()
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.nibble.blocked_linear(*moved)


def test_the_struct_is_as_long_as_the_librarys() -> None:
    assert ctypes.sizeof(native_library.BlockedStruct) == 10 * 8


def test_the_processor_is_known() -> None:
    model, features = processor()
    assert model
    assert isinstance(features, frozenset)


@pytest.mark.parametrize("name", ["amx", "avx512"])
def test_a_copied_kernel_has_a_weight_of_its_own(name: str) -> None:
    kernel = kernel_of(name, random_weight(16, 128), torch.bfloat16)
    x = random_input((1, 128), torch.bfloat16)
    copied, expected = copy.deepcopy(kernel), kernel(x, None)
    assert isinstance(kernel, native.NativeKernel)
    kernel.weight.codes.zero_()
    assert not torch.equal(kernel(x, None), expected)
    assert torch.equal(copied(x, None), expected)


@pytest.mark.parametrize("name", ["amx", "avx512"])
def test_the_operator_and_the_kernel_agree(name: str) -> None:
    kernel = kernel_of(name, random_weight(40, 256, asymmetric=True), torch.bfloat16)
    assert isinstance(kernel, native.NativeKernel)
    weight = kernel.weight
    for rows in (1, 3, 20):
        x, bias = random_input((rows, 256), torch.bfloat16), random_input((40,), torch.bfloat16)
        output = torch.ops.nibble.blocked_linear(
            x, weight.codes, weight.scale, weight.zero, bias, 4, 128, 40, name == "amx"
        )
        assert torch.equal(output, kernel(x, bias))
