"""Whoever computes for jobs asks for huge pages before PyTorch is loaded: fewer page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
STARTED = """
import contextlib, resource, runpy, sys
module, sys.argv = sys.argv[1], ["process"]
with contextlib.suppress(SystemExit):  # of arguments that are missing
    runpy.run_module(module, run_name="__main__")
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2**26 // 4096  # of that tensor, in small ones


@pytest.mark.parametrize("module", ["workers.child", "workers.devices.profile_measurement"])
def test_large_tensors_lie_in_huge_pages(module: str) -> None:
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text("utf-8"):
        pytest.skip("the system has no huge pages to give")
    done = subprocess.run([sys.executable, "-c", STARTED, module], capture_output=True, text=True, check=True)
    assert int(done.stdout) < PAGES / 4
