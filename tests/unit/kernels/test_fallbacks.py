"""An operator that leaves its kernel says why: once in the log, and in the report."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import fallbacks
from kernels.cuda import packing
from kernels.cuda.compiler import CompileError
from kernels.search import cuda as search


class NoCompiler:
    """A library of kernels on a machine that can't make them."""

    def function(self, *arguments: object) -> None:
        raise CompileError("no CUDA compiler: neither nvcc nor the NVRTC library was found")


@pytest.fixture(autouse=True)
def nothing_met(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fallbacks, "MET", {})
    for module in (packing, search):
        monkeypatch.setattr(module, "shared_library", NoCompiler)
    packing.missing.cache_clear()
    search.runs_on.cache_clear()
    yield
    packing.missing.cache_clear()
    search.runs_on.cache_clear()


def on_gpu(numel: int) -> Any:
    return SimpleNamespace(is_cuda=True, get_device=lambda: 0, numel=lambda: numel)


def test_a_missing_compiler_is_said_once_for_each_operator(caplog: pytest.LogCaptureFixture) -> None:
    assert not packing.takes("pack", torch.zeros(1))  # of a CPU: no kernel is meant for it
    assert fallbacks.noted() == ()
    for _ in range(3):
        assert not packing.takes("pack", on_gpu(1))
    assert not packing.takes("dequantize", on_gpu(1))
    why = (
        "ran in PyTorch instead of its kernel: no CUDA compiler: neither nvcc nor the NVRTC library was found"
    )
    assert fallbacks.noted() == (f"pack {why}", f"dequantize {why}")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "pack runs in PyTorch instead of its kernel: no CUDA compiler" in caplog.text


def test_tensors_beyond_the_indices_are_said() -> None:
    assert not packing.takes("unpack", on_gpu(2**31))
    assert "more than 2147483647 values" in fallbacks.noted()[0]


def test_the_search_says_what_its_kernels_do_not_take() -> None:
    whole = torch.zeros(4, 256)
    assert search.fits(128, (whole,))
    assert fallbacks.noted() == ()
    assert not search.fits(-1, (whole,))
    assert not search.fits(128, (torch.zeros(4 * 256 + 1)[1:].view(4, 256),))
    assert not search.can_dot(whole, whole.double())
    assert not search.runs_on(0)
    reasons = [sentence.partition("kernel: ")[2] for sentence in fallbacks.noted()]
    assert reasons == [
        "group_size=-1 is none of 32, 64, 128",
        "rows that don't start at multiples of 16 bytes",
        "torch.float32 and torch.float64, or rows that are no whole pairs of columns",
        "no CUDA compiler: neither nvcc nor the NVRTC library was found",
    ]
