"""Memory of a worker's device."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.devices import device_memory as module
from workers.devices.device_memory import UNKNOWN, DeviceMemory, device_memory


def program(folder: Path, text: str) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def test_the_host_has_memory_and_uses_some() -> None:
    used, total = device_memory("cpu")
    assert used is not None
    assert total is not None
    assert 0 < used < total


def test_a_gpu_is_asked_through_the_drivers_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, 'test "$4" = 1 && echo "512, 81559"')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_memory("cuda:1") == DeviceMemory(512 * 1024**2, 81559 * 1024**2)


@pytest.mark.parametrize("text", ["exit 9", "echo '[N/A], 7'", "echo"])
def test_what_cannot_be_told_is_unknown(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, text)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_memory("cuda:0") == UNKNOWN
    monkeypatch.setattr(module, "MEMORY_TABLE", tmp_path / "absent")
    assert device_memory("cpu") == UNKNOWN
