"""The C++ kernels of the CPU: compiled when they are first used, kept on disk, loaded once.

A library's name is a digest of all that goes into it: sources, flags, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import Tensor

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-O2",
    "-march=native",
    "-fopenmp",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-w",
)
TILES = "-DNIBBLE_AMX"
COMPILE_TIMEOUT_S = 300

VECTORS_NEED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
LANES_NEED = VECTORS_NEED | {"avx512_vnni"}
TILES_NEED = LANES_NEED | {"avx512_bf16", "amx_tile", "amx_bf16"}


@dataclass(frozen=True)
class Sources:
    """The source, headers and flags of one library."""

    source: str  # the file that is compiled
    headers: tuple[str, ...]
    flags: tuple[str, ...]  # besides those of all


LINEAR = Sources(
    "linear.cpp",
    ("blocks.h", "registers.h", "digits.h", "output.h", "tiles.h"),
    ("-mprefer-vector-width=512",),
)
DECODER = Sources(
    "decoder.cpp",
    ("blocks.h", "registers.h", "vectors.h", "numbers.h", "products.h", "lanes.h", "attention.h"),
    ("-O3", "-std=c++20", "-mprefer-vector-width=512"),
)
# Without contraction every product and sum is rounded, as PyTorch's are.
SEARCH = Sources(
    "search.cpp", ("registers.h", "vectors.h", "search_products.h", "columns.h"), ("-ffp-contract=off",)
)
CHECKSUM = Sources("checksum.cpp", ("vectors.h",), ())
NEAREST = Sources("nearest_numbers.cpp", ("vectors.h",), ("-ffp-contract=off",))


class NotCompiled(Exception):
    """Why there is no library."""


class BlockedStruct(ctypes.Structure):
    """`Weight` of linear.cpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("per_chunk", ctypes.c_int64),
        ("scale_type", ctypes.c_int64),
        ("planes", ctypes.c_int64),
        ("midpoints", ctypes.c_void_p),
        ("in_lanes", ctypes.c_int64),
    )


def default_folder() -> Path:
    """Where libraries lie unless the caller names a folder.

    Raises NotCompiled for a user without a home.
    """
    try:
        return Path.home() / ".cache" / "nibble" / "cpu"
    except RuntimeError as fault:
        raise NotCompiled(f"there is no place for compiled kernels: {fault}") from fault


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """The first processor's model and its features, as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return "unknown", frozenset()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", "unknown"), frozenset(fields.get("flags", "").split())


def native_library() -> ctypes.CDLL:
    """The library of products on AMX tiles.

    Raises NotCompiled if the processor, the system or the compiler is not up to it.
    """
    outcome = library_or_reason()
    if isinstance(outcome, str):
        raise NotCompiled(outcome)
    return outcome


@functools.cache
def library_or_reason() -> ctypes.CDLL | str:
    """The library, or why it can't be compiled: a process tries once."""
    try:
        return made_library()
    except NotCompiled as fault:
        return str(fault)


def made_library() -> ctypes.CDLL:
    check_processor(TILES_NEED)
    library = typed(built(LINEAR, tiles=True))
    if not library.nibble_tiles_ready():
        raise NotCompiled("the system does not grant AMX's registers")
    return library


def check_processor(needed: frozenset[str]) -> None:
    """Raises NotCompiled if the processor lacks one of the features."""
    model, features = processor()
    missing = sorted(needed - features)
    if missing:
        raise NotCompiled(f"the processor ({model}) lacks {', '.join(missing)}")


def built(sources: Sources, *, tiles: bool) -> ctypes.CDLL:
    """The library, from its folder or made now.

    Raises NotCompiled with what went wrong.
    """
    path = compiled(default_folder(), tiles=tiles, sources=sources)
    try:
        return ctypes.CDLL(str(path))
    except OSError as fault:
        raise NotCompiled(f"the compiled kernels can't be loaded: {fault}") from fault


def compiled(folder: Path, *, tiles: bool, sources: Sources = LINEAR) -> Path:
    """The library's file, made if this is the first use.

    Raises NotCompiled with what went wrong.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NotCompiled(f"no C++ compiler on PATH: none of {', '.join(COMPILERS)}")
    flags = (*FLAGS, *sources.flags, *((TILES,) if tiles else ()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{Path(sources.source).stem}-{library_key(compiler, flags, sources)}.so"
        with FileLock(path.with_suffix(".lock"), fallback_to_soft=False):
            if not path.exists():
                partial = path.with_suffix(f".{os.getpid()}.part")
                run_compiler([compiler, *flags, str(SOURCES / sources.source), "-o", str(partial)])
                partial.replace(path)
    except OSError as fault:
        raise NotCompiled(f"the folder of compiled kernels can't be used: {fault}") from fault
    return path


def library_key(compiler: str, flags: tuple[str, ...], sources: Sources) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    model, features = processor()
    digest = hashlib.sha256("\0".join([version, *flags, model, *sorted(features)]).encode())
    for name in (sources.source, *sources.headers):
        digest.update(name.encode() + b"\0" + (SOURCES / name).read_bytes())
    return digest.hexdigest()[:24]


def run_compiler(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as fault:
        raise NotCompiled(f"{command[0]} took longer than {COMPILE_TIMEOUT_S} s") from fault
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
        raise NotCompiled(f"{command[0]} failed with {result.returncode}: {first}")


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library of products with the types of its functions."""
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    weight = ctypes.POINTER(BlockedStruct)
    for name in ("nibble_digits", "nibble_tiles", "nibble_tiles_exact"):
        product = library[name]
        product.argtypes = [weight, pointer, number, number, pointer, pointer, number, number, threads]
        product.restype = ctypes.c_int if name == "nibble_digits" else None
        setattr(library, name, product)  # what is looked up by index is another object each time
    return library


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
