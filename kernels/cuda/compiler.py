"""From a CUDA C++ source to a cubin, by nvcc or NVRTC: which compiler, its flags, and what it reports."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
COMMON_FLAGS = ("--std=c++17",)
NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
TIMEOUT_S = 600


class CompileError(Exception):
    """A kernel's source did not compile, or no compiler is at hand."""


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture, and the compiler's report on its registers and memory."""

    code: bytes
    report: str


class Compiler(Protocol):
    """Compiles a source file into machine code."""

    @property
    def version(self) -> str: ...

    def compile(self, source: Path, architecture: str, defines: Sequence[str]) -> Compiled: ...


def architecture_for(capability: tuple[int, int]) -> str | None:
    """The architecture whose machine code runs on a device of this compute capability, None if none does."""
    return {8: "sm_80", 9: "sm_90a", 10: "sm_100", 12: "sm_120"}.get(capability[0])


class Nvcc:
    """The toolkit's command."""

    def __init__(self, path: str) -> None:
        self.path = path

    @functools.cached_property
    def version(self) -> str:
        result = subprocess.run([self.path, "--version"], capture_output=True, text=True, check=False)
        match = re.search(r"release [\d.]+, V([\d.]+)", result.stdout)
        if match is None:
            raise CompileError(f"{self.path} --version says {result.stdout or result.stderr!r}")
        return f"nvcc {match[1]}"

    def compile(self, source: Path, architecture: str, defines: Sequence[str]) -> Compiled:
        virtual = architecture.replace("sm_", "compute_")
        target = f"-gencode=arch={virtual},code={architecture}"
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "kernel.cubin"
            command = [self.path, *COMMON_FLAGS, "--cubin", target, "-Xptxas=-v", f"-I{source.parent}"]
            command += [*(f"-D{define}" for define in defines), "-o", str(output), str(source)]
            result = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=folder
            )
            if result.returncode:
                raise CompileError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
            return Compiled(output.read_bytes(), result.stderr)


class Nvrtc:
    """The compiler as a library: it comes with the CUDA builds of PyTorch, so no toolkit is needed."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @functools.cached_property
    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return f"nvrtc {major.value}.{minor.value}"

    def compile(self, source: Path, architecture: str, defines: Sequence[str]) -> Compiled:
        options = [*COMMON_FLAGS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
        options += [f"-I{source.parent}", *(f"-D{define}" for define in defines)]
        program = ctypes.c_void_p()
        text, name = source.read_bytes(), source.name.encode()
        self._check(self.library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
        try:
            words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self.library.nvrtcCompileProgram(program, len(options), words)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{source.name} did not compile with {self.version}:\n{log}")
            return Compiled(self._read(program, "CUBIN"), log)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(self.library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(self.library[f"nvrtcGet{what}"](program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise CompileError(f"NVRTC: {self.library.nvrtcGetErrorString(status).decode()}")


def find_compiler() -> Compiler | None:
    """nvcc of PATH or of the toolkit's usual place, else NVRTC where a library of it is found."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    path = shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    return Nvcc(path) if path else find_nvrtc()


def find_nvrtc() -> Compiler | None:
    """NVRTC by its name, or among the installed packages."""
    folders = [Path(folder) for folder in (*site.getsitepackages(), *sys.path)]
    packaged = [str(path) for folder in folders for path in folder.glob("nvidia/*/lib/libnvrtc.so.*")]
    for name in (*NVRTC_NAMES, *packaged):
        try:
            return Nvrtc(ctypes.CDLL(name))
        except OSError:
            continue
    return None
