"""What every figure from here needs beside it: devices and versions, at the head of the run."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kernels.search.search_operators import search_backend

PACKAGES = ("torch", "transformers", "triton", "numpy", "tokenizers")


def pytest_report_header() -> list[str]:
    """`pytest tests/gpu` prints these lines first."""
    versions = [f"{name} {installed(name)}" for name in PACKAGES]
    return [
        f"gpus: {'; '.join(gpus()) or 'none'}",
        f"versions: Python {platform.python_version()}, CUDA {torch.version.cuda}, {', '.join(versions)}",
        f"commit: {output('git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty')}",
        f"processor: {processor_name()}; the search on it runs as {search_backend(torch.device('cpu'))}",
    ]


def gpus() -> list[str]:
    fields = "--query-gpu=index,name,driver_version,compute_cap,memory.total"
    return output("nvidia-smi", fields, "--format=csv,noheader").splitlines()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def output(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
