"""The clip step's own CUDA source without a GPU: compiled for the host, with threads as CUDA's.

The products are tf32's with exact sums. That shows races, uninitialised memory and wrong tiles, and what the
kernel's roundings choose; not what the compiler for GPUs makes of it (tests/gpu/test_search_cuda.py).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.search.cuda import rule_arguments
from kernels.search.grids import GridRule
from tests.clip_judge import UNITS, Judge

HOST = Path(__file__).with_name("search_on_host.cpp")
JOINT, SIDE = (0.95, 0.8, 0.6), (1.1, 0.9)
SANITIZED = ("-O1", "-fsanitize=thread")  # without -O, copies of whole structures are not looked at
RULES = [
    GridRule(bits, symmetric, dtype)
    for bits, dtype in ((2, torch.float16), (4, torch.bfloat16), (8, torch.float32))
    for symmetric in (False, True)
]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


class StepStruct(ctypes.Structure):
    """`Step` of search_on_host.cpp."""

    _fields_ = [
        *(
            field
            for name in ("weight", "block", "others", "error", "ranges")
            for field in ((name, ctypes.c_void_p), (f"{name}_stride", ctypes.c_int))
        ),
        ("factors", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("joint", "side", "rows", "steps", "symmetric", "scale_type")),
        ("two_steps", ctypes.c_float),
    ]


def function_with(source: str, head: str, body: str) -> str:
    """The source with another body of the function that `head` begins."""
    start = source.index("{", source.index(head)) + 1
    return source[:start] + body + source[source.index("\n}", start) :]


def host_source(repository: Path) -> str:
    source = (repository / "kernels" / "csrc" / "cuda" / "search.cu").read_text()
    source = function_with(source, "void multiply(", "mma(sum, a, b);")
    source = function_with(source, "float tf32(", "return rounded(value);")
    source = source.replace('#include "ptx.cuh"', "")
    source = source.replace("extern __shared__ float4 shared[];", "float4* shared = shared_memory;")
    assert "asm(" not in source
    return source


def compiled(folder: Path, source: str, *flags: str) -> Path:
    (folder / "search_source.inc").write_text(source)
    made = folder / "search"
    # No contraction: what the kernel fuses it says; the warnings are about #pragma unroll.
    command = ["g++", "-std=c++20", "-ffp-contract=off", "-w", "-pthread", f"-I{folder}", *flags]
    subprocess.run([*command, str(HOST), "-o", str(made)], check=True, timeout=120)
    return made


def races(program: Path, *case: int) -> str:
    """What ThreadSanitizer says about a run with this size, rows and warps."""
    command = ["setarch", "-R", str(program), *map(str, case)]  # it wants its own places in memory
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if "unexpected memory mapping" in ended.stderr or "failed to set personality" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == (66 if ended.stderr else 0), ended.stderr  # 66: it reported something
    return ended.stderr


@pytest.fixture(scope="module")
def sanitized(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("sanitized"), host_source(repository), *SANITIZED)


@pytest.mark.parametrize("case", [(32, 5, 2), (64, 100, 4)], ids=["5 rows", "100 rows"])
def test_no_two_threads_race(case: tuple[int, int, int], sanitized: Path) -> None:
    """Rows that leave lanes, warps and the last block partly empty."""
    assert races(sanitized, *case) == ""


@pytest.mark.parametrize("barrier", ["__syncthreads();", "__syncwarp();"])
def test_a_missing_barrier_is_a_race(barrier: str, repository: Path, tmp_path: Path) -> None:
    source = host_source(repository)
    assert source.count(barrier) == 1
    assert "data race" in races(compiled(tmp_path, source.replace(barrier, ""), *SANITIZED), 32, 40, 2)


@pytest.fixture(scope="module")
def library(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = ("-O1", "-shared", "-fPIC")
    return ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("host"), host_source(repository), *flags)))


def stepped(
    library: ctypes.CDLL, group: tuple[Tensor, ...], rule: GridRule, warps: int
) -> tuple[Tensor, Tensor]:
    rows, size = group[0].shape
    error, ranges = torch.full((rows, size), torch.nan), torch.ones(4, rows)
    ranges[2:] = torch.nan
    factors = torch.tensor([*JOINT, *SIDE])
    strided = [value for tensor in (*group, error, ranges) for value in (tensor.data_ptr(), tensor.stride(0))]
    step = StepStruct(
        *strided, factors.data_ptr(), len(JOINT), len(SIDE), rows, *rule_arguments(rule)
    )  # fmt: skip
    library.run(size, warps, ctypes.byref(step))
    return error, ranges


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"w{rule.bits}{'s' if rule.symmetric else 'a'}")
@pytest.mark.parametrize(("rows", "size"), [(5, 32), (39, 64)])
def test_choices_are_the_best_within_rounding(
    rule: GridRule, rows: int, size: int, library: ctypes.CDLL
) -> None:
    """Shared memory begins as NaN, so reading too early shows. Blocks of any size give the same bits."""
    weight, x = torch.randn(rows, 3 * size), torch.randn(4 * size, size)
    group = (weight[:, size : 2 * size], x.T @ x / len(x), 0.1 * torch.randn(rows, size))
    error, ranges = stepped(library, group, rule, 2)
    assert bool(Judge(*group, rule, UNITS["tf32"]).right(torch.ones(2, rows), ranges[:2], JOINT, SIDE).all())
    scale, zero = ranges[2:]
    assert torch.equal(error, rule.nearest(group[0], scale[:, None], zero[:, None]) - group[0])
    again = stepped(library, group, rule, 4)
    assert all(torch.equal(*pair) for pair in zip((error, ranges), again, strict=True))
