"""Compiled kernels on disk, named by everything that goes into them, one compilation at a time."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from kernels.cuda.compiler import ARCHITECTURES, SOURCES, Compiled, CompileError, Compiler, find_compiler

RESOURCES = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
REGISTERS = re.compile(r"Used (\d+) registers")


def default_folder() -> Path:
    """Where cubins lie unless the caller names a folder."""
    return Path.home() / ".cache" / "nibble" / "cubins"


class CubinCache:
    """Cubins by source, architecture, defines and compiler.

    A compiler is looked for at the first miss only: a folder that was filled elsewhere serves a machine
    without one, if the compiler's version that filled it is named.
    """

    def __init__(self, folder: Path | None = None, compiler: Compiler | None = None) -> None:
        self.folder = folder or default_folder()
        self.compiler = compiler or find_compiler()

    def get(self, source: str, architecture: str, defines: Mapping[str, int | str] | None = None) -> Compiled:
        """The cubin of `source` (a file of kernels/csrc/cuda), compiled if this is the first use.

        Raises ValueError for an unknown architecture or source, CompileError when it can't be compiled.
        """
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture!r}: known are {', '.join(ARCHITECTURES)}")
        path = SOURCES / source
        if not path.is_file():
            raise ValueError(f"source {source!r} is not among {sorted(p.name for p in SOURCES.glob('*.cu'))}")
        if self.compiler is None:
            raise CompileError("no CUDA compiler: neither nvcc nor the NVRTC library was found")
        words = [f"{name}={value}" for name, value in sorted((defines or {}).items())]
        key = cache_key(path, [architecture, *words, self.compiler.version])
        self.folder.mkdir(parents=True, exist_ok=True)
        cubin = self.folder / f"{path.stem}-{architecture}-{key}.cubin"
        report = cubin.with_suffix(".txt")
        with FileLock(cubin.with_suffix(".lock"), fallback_to_soft=False):
            if not cubin.exists():
                compiled = self.compiler.compile(path, architecture, words)
                write(report, compiled.report.encode())
                write(cubin, compiled.code)
            return Compiled(cubin.read_bytes(), report.read_text())


def cache_key(source: Path, words: list[str]) -> str:
    """A digest of the source, of the headers that it includes, and of `words`."""
    digest = hashlib.sha256()
    for path in (source, *sorted(included_headers(source))):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    digest.update("\0".join(words).encode())
    return digest.hexdigest()[:24]


def included_headers(source: Path) -> set[Path]:
    """The headers beside `source` that it includes, directly or not."""
    headers: set[Path] = set()
    waiting = [source]
    while waiting:
        for name in INCLUDE.findall(waiting.pop().read_text()):
            header = source.parent / name
            if header not in headers:
                headers.add(header)
                waiting.append(header)
    return headers


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see all of it or nothing."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(content)
    partial.replace(path)


def spilled_bytes(report: str) -> int:
    """Bytes that all kernels of a compiler's report spill to local memory, stack frames included."""
    return sum(sum(int(value) for value in match.groups()) for match in RESOURCES.finditer(report))


def register_counts(report: str) -> list[int]:
    """Registers of each kernel in a compiler's report."""
    return [int(count) for count in REGISTERS.findall(report)]
