"""The checks of `nibble doctor` that need torch: a program that prints one JSON line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from kernels.cpu.native_library import COMPILERS, FLAGS, LANES_NEED, processor
from kernels.cuda.compiler import CompileError, architecture_for, find_compiler
from workers.devices.torch_process import leave

TRY_LIMIT_S = 60
PROGRAM = "#include <omp.h>\n#include <immintrin.h>\nint threads() { return omp_get_max_threads(); }\n"


def cuda_facts() -> dict[str, Any]:
    """The devices that torch can use, or why there are none."""
    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "devices": [], "cuda_error": None}
    if torch.version.cuda is None:
        return facts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            facts["devices"] = [device_facts(index) for index in range(torch.cuda.device_count())]
        except RuntimeError as fault:
            facts["cuda_error"] = str(fault).partition("\n")[0]
    if caught and not facts["devices"]:
        facts["cuda_error"] = str(caught[0].message).partition("\n")[0]
    return facts


def device_facts(index: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "own_kernels": architecture_for((major, minor)) is not None,
    }


def cuda_compiler() -> str | None:
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        return compiler.version
    except CompileError:
        return None


def compiler_facts() -> dict[str, Any]:
    """The C++ compiler, and whether it takes the flags of the CPU's kernels."""
    _, features = processor()
    facts: dict[str, Any] = {
        "compiler": None,
        "compiler_error": None,
        "cpu_lacks": sorted(LANES_NEED - features),
    }
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return {**facts, "compiler_error": f"none of {', '.join(COMPILERS)} is on PATH"}
    facts["compiler"] = compiler
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROGRAM)
        command = [compiler, *FLAGS, str(source), "-o", str(source.with_suffix(".so"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=TRY_LIMIT_S, check=False)
        except (OSError, subprocess.SubprocessError) as fault:
            return {**facts, "compiler_error": f"{compiler}: {fault}"}
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        facts["compiler_error"] = f"{compiler}: {last}"
    return facts


def main() -> None:
    facts = {"torch": torch.__version__, "cuda_compiler": cuda_compiler(), **cuda_facts(), **compiler_facts()}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
    leave(0)
