"""What the CPU's backends refuse, and why: processors, compilers, folders, inputs, arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from kernels.backend import select_backend
from kernels.cpu import native_library
from kernels.cpu.blocked_layout import to_blocks
from kernels.cpu.native import NativeBackend
from kernels.cpu.native_library import NotCompiled, compiled, processor
from kernels.cpu.whole_decoder import decoder_library
from tests.unit.kernels.cpu_kernels import BACKENDS, kernel_of, problem_of
from tests.unit.kernels.weights import random_input, random_weight


def test_a_processor_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "processor", lambda: ("Old One", frozenset({"avx512f"})))
    native_library.library_or_reason.cache_clear()
    decoder_library.cache_clear()
    try:
        weight = random_weight(16, 128)
        selection = select_backend(problem_of(weight, torch.bfloat16))
        assert selection.backend.name in {"aten", "torch"}
        assert selection.refusals[1] == (
            "vector",
            "the processor (Old One) lacks avx512bw, avx512dq, avx512vl",
        )
        with pytest.raises(ValueError, match=r"'amx' can't compute .*Old One.* lacks amx_bf16"):
            select_backend(problem_of(weight, torch.bfloat16), "amx")
    finally:
        native_library.library_or_reason.cache_clear()
        decoder_library.cache_clear()


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
        backend = NativeBackend()
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
    "zero": BLOCKS.zero, "bias": None, "bits": 4, "group_size": -1, "out_features": 70,
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
    assert ctypes.sizeof(native_library.BlockedStruct) == 11 * 8


def test_the_processor_is_known() -> None:
    model, features = processor()
    assert model
    assert isinstance(features, frozenset)
