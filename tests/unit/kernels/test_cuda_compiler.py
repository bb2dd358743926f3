"""The CUDA sources compile for every architecture without spills, and the cache compiles each once."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kernels.cuda.compiler import (
    ARCHITECTURES,
    SOURCES,
    Compiled,
    CompileError,
    architecture_for,
    find_compiler,
    find_nvrtc,
)
from kernels.cuda.cubin_cache import CubinCache, register_counts, spilled_bytes
from kernels.cuda.decode import VARIANTS, DecodeShape, make_plan
from kernels.cuda.layout import Format
from kernels.cuda.standard_kernels import DEVICES, compile_each

COMPILER = find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="neither nvcc nor NVRTC is here")
# Bytes that ptxas of NVRTC 13.5 spills: registers bound the search on Blackwell, where it has not run yet.
SPILLED = {("search.cu", "sm_100"): 392, ("search.cu", "sm_120"): 428}
NAMES = sorted(path.name for path in SOURCES.glob("*.cu"))


class CountingCompiler:
    """Stands in for a compiler where only the cache is under test."""

    def __init__(self, version: str = "stand-in 1") -> None:
        self.version = version
        self.calls: list[tuple[str, ...]] = []

    def compile(self, source: Path, architecture: str, defines: Sequence[str]) -> Compiled:
        self.calls.append((source.name, architecture, *defines))
        return Compiled(b"code of " + architecture.encode(), "report")


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_every_source_compiles_without_spills(name: str, architecture: str, tmp_path: Path) -> None:
    compiled = CubinCache(tmp_path, COMPILER).get(name, architecture)
    assert compiled.code.startswith(b"\x7fELF")
    assert register_counts(compiled.report)
    assert spilled_bytes(compiled.report) <= SPILLED.get((name, architecture), 0)


@needs_compiler
@pytest.mark.parametrize(("bits", "architecture"), [(3, "sm_80"), (4, "sm_90a"), (8, "sm_90a")])
def test_what_decodes_keeps_its_sums_in_registers(bits: int, architecture: str, tmp_path: Path) -> None:
    """The widest strip, for one token: 255 registers would be a spill in disguise."""
    form = Format(bits, 128, asymmetric=True, scale_dtype=torch.bfloat16)
    defines = DecodeShape(7, 1, 1, 8, 2, held_tokens=1).defines(form, torch.bfloat16)
    report = CubinCache(tmp_path, COMPILER).get("decode.cu", architecture, defines).report
    assert spilled_bytes(report) == 0
    assert max(register_counts(report)) <= 224


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_variants_that_are_off_compile_too(architecture: str, tmp_path: Path) -> None:
    assert not any(VARIANTS.values())
    form = Format(4, 128, asymmetric=False, scale_dtype=torch.bfloat16)
    defines = {
        **DecodeShape(1, 1, 1, 4, 4, held_tokens=1).defines(form, torch.bfloat16),
        **dict.fromkeys(VARIANTS, 1),
    }
    assert spilled_bytes(CubinCache(tmp_path, COMPILER).get("decode.cu", architecture, defines).report) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_places_that_are_counted_are_those_that_are_divided_for(tmp_path: Path) -> None:
    """decode.cu's own struct, on the host: every place of a group's turns, for ragged sizes."""
    text = (SOURCES / "decode.cu").read_text()
    start = text.index("struct Place {")
    struct = text[start : text.index("\n};", start) + 3]
    program = f"""
    #define __device__
    #define __forceinline__
    typedef unsigned u32;
    constexpr u32 SPLITS = WANTED;
    {struct}
    int main() {{
      for (u32 units = 1; units < 40; ++units)
        for (u32 begin = 0; begin < 90; ++begin) {{
          Place place{{begin, begin / units, begin % units}};
          for (u32 at = begin; at < begin + 400; at += SPLITS, place.advance(units))
            if (place.at != at || place.strip != at / units || place.unit != at % units) return 1;
        }}
      return 0;
    }}"""
    (tmp_path / "place.cpp").write_text(program)
    for splits in (1, 2, 8, 16):
        executable = tmp_path / f"place{splits}"
        command = ["g++", "-O1", f"-DWANTED={splits}", str(tmp_path / "place.cpp"), "-o", str(executable)]
        subprocess.run(command, check=True)
        assert subprocess.run([str(executable)], check=False).returncode == 0


@needs_compiler
def test_an_error_of_the_compiler_is_shown(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"(?s)nv(cc|rtc).*BITS"):
        CubinCache(tmp_path, COMPILER).get("packing.cu", "sm_80", {"BITS": "no-number"})


def test_nvrtc_compiles_without_a_toolkit(tmp_path: Path) -> None:
    nvrtc = find_nvrtc()
    if nvrtc is None:
        pytest.skip("the NVRTC library is not installed")
    compiled = CubinCache(tmp_path, nvrtc).get("packing.cu", "sm_90a", {"BITS": 3})
    assert compiled.code.startswith(b"\x7fELF")
    assert spilled_bytes(compiled.report) == 0


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    compiler = CountingCompiler()
    first = CubinCache(tmp_path, compiler).get("packing.cu", "sm_80", {"BITS": 4})
    second = CubinCache(tmp_path, compiler).get("packing.cu", "sm_80", {"BITS": 4})
    assert first == second == Compiled(b"code of sm_80", "report")
    assert compiler.calls == [("packing.cu", "sm_80", "BITS=4")]


def test_architecture_defines_and_compiler_are_part_of_the_key(tmp_path: Path) -> None:
    compiler, newer = CountingCompiler(), CountingCompiler("stand-in 2")
    for architecture in ARCHITECTURES:
        for bits in (3, 4):
            CubinCache(tmp_path, compiler).get("packing.cu", architecture, {"BITS": bits})
            CubinCache(tmp_path, newer).get("packing.cu", architecture, {"BITS": bits})
    assert len(compiler.calls) == len(newer.calls) == 2 * len(ARCHITECTURES)
    assert len(list(tmp_path.glob("*.cubin"))) == 4 * len(ARCHITECTURES)


def test_threads_wait_for_the_one_that_compiles(tmp_path: Path) -> None:
    compiler = CountingCompiler()
    threads = [
        threading.Thread(target=CubinCache(tmp_path, compiler).get, args=("packing.cu", "sm_90a"))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.calls) == 1
    assert not list(tmp_path.glob("*.part"))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    cache = CubinCache(tmp_path, CountingCompiler())
    with pytest.raises(ValueError, match=r"architecture 'sm_70': known are sm_80, sm_90a"):
        cache.get("packing.cu", "sm_70")
    with pytest.raises(ValueError, match=r"source 'absent.cu' is not among"):
        cache.get("absent.cu", "sm_80")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((7, 5), None),
    ],
)
def test_machine_code_runs_within_one_generation(
    capability: tuple[int, int], architecture: str | None
) -> None:
    assert architecture_for(capability) == architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_kernels_are_those_that_loading_asks_for(architecture: str, tmp_path: Path) -> None:
    """Under the keys of the cache that a first call looks up; a second filling compiles nothing."""
    compiler = CountingCompiler()
    cache = CubinCache(tmp_path, compiler)
    first = list(compile_each(architecture, cache, threads=2))
    count = len(first)
    assert [kernel.done for kernel in first] == list(range(1, count + 1))
    assert {(kernel.architecture, kernel.of) for kernel in first} == {(architecture, count)}
    assert len(compiler.calls) == count == len(set(compiler.calls))
    form = Format(4, 128, asymmetric=False, scale_dtype=torch.bfloat16)
    plan = make_plan(8, 14336, 4096, form, DEVICES[architecture])
    cache.get("decode.cu", architecture, plan.shape.defines(form, torch.bfloat16))
    cache.get("search.cu", architecture)
    assert len(list(compile_each(architecture, cache, threads=2))) == len(compiler.calls) == count
    sources = {source for source, *_ in compiler.calls}
    assert sources == {
        "search.cu",
        "records.cu",
        "decode.cu",
        *({"wide.cu"} if architecture == "sm_90a" else ()),
    }
