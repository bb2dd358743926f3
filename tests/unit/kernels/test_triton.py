"""The Triton kernel in its interpreter, and when its backend refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.product import LinearProduct
from kernels.triton_backend.backend import TritonBackend

PROBE = "tests.unit.kernels.triton_probe"
PROBLEM = LinearProduct(
    bits=4, group_size=128, in_features=128, out_features=16, asymmetric=False, dtype=torch.float16,
    device_type="cuda", capability=(8, 6),
)  # fmt: skip
installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(probe: str, repository: Path) -> dict[str, float | None]:
    """What a probe prints last, in a process with Triton's interpreter."""
    result = subprocess.run(
        [sys.executable, "-m", probe],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=repository,
    )
    assert result.returncode == 0, result.stderr
    errors: dict[str, float | None] = json.loads(result.stdout.splitlines()[-1])
    return errors


@installed
def test_attention_reads_what_the_mask_shows_and_nothing_else(repository: Path) -> None:
    """Against float64; hidden keys and values are NaN."""
    errors = interpreted("tests.unit.kernels.attention_probe", repository)
    assert len(errors) == 5
    assert {name: error for name, error in errors.items() if error is None or not error < 1e-5} == {}


@installed
def test_every_scheme_is_the_references(repository: Path) -> None:
    """In a process of its own: whether kernels are interpreted is decided when they are imported."""
    errors = interpreted(PROBE, repository)
    assert len(errors) == 37
    assert {name: error for name, error in errors.items() if error is None or not error < 5e-3} == {}


def test_the_backend_says_why_not() -> None:
    backend = TritonBackend()
    assert backend.can_implement(replace(PROBLEM, device_type="cpu", capability=None)) == (
        "it runs on GPUs, not on cpu"
    )
    assert backend.can_implement(replace(PROBLEM, capability=(7, 0))) == (
        "compute capability (7, 0) is below (7, 5)"
    )


@installed
def test_it_takes_what_the_cuda_backend_leaves() -> None:
    for problem in (
        replace(PROBLEM, capability=(12, 0)),
        replace(PROBLEM, in_features=100, group_size=-1),
        replace(PROBLEM, dtype=torch.float32),
    ):
        assert TritonBackend().can_implement(problem) is None
