"""The other programs that begin on a GPU, each in a process in which nothing has asked CUDA for anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from app.core.planning.device_profile import profile_of

LIMIT_S = 300


def run(*command: str) -> str:
    """What a program prints that ends well."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


def test_the_device_is_measured(tmp_path: Path) -> None:
    module = ("-m", "workers.devices.profile_measurement", "--device", "cuda:0", "--folder", str(tmp_path))
    rates: dict[str, float] = {}
    for line in run(sys.executable, *module).splitlines():
        rates |= json.loads(line)
    profile = profile_of("cuda", rates)
    assert profile.basis == "measured"
    assert min(profile.matmul.values()) > 0


def test_the_probe_lists_the_devices() -> None:
    facts = json.loads(run(sys.executable, "-m", "workers.devices.host_probe").splitlines()[-1])
    assert facts["cuda_error"] is None
    assert [device["name"] for device in facts["devices"]] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]


def test_the_terminal_quantizes(example_model: Path, tmp_path: Path) -> None:
    """`nibble quantize` starts a job child, as a worker does."""
    out = tmp_path / "out"
    program = str(Path(sys.executable).with_name("nibble"))
    small = ("--method", "rtn", "--num-samples", "8", "--sequence-length", "128", "--eval-samples", "4")
    options = (*small, "--device", "cuda:0", "--out", str(out), "--json")
    report = json.loads(run(program, "quantize", str(example_model), *options))
    assert report["environment"]["device"] == "cuda:0"
    assert report["peak_vram_bytes"] > 0
    assert list(out.rglob("*.safetensors"))
