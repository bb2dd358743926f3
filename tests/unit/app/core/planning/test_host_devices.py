"""`cuda:N` is the N-th GPU that CUDA_VISIBLE_DEVICES leaves, whatever the driver's program lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.planning.host_devices import driver_name, gpu_names, has_gpu
from workers.devices.device_memory import DeviceMemory, device_memory
from workers.main import describe_device, resolve_device

LISTED = 'echo "GPU-aa1, A"; echo "GPU-bb2, B"; echo "GPU-bc3, C"'
MEMORY = 'test "$1" = --query-gpu=memory.used,memory.total && echo "$4, 80000" | sed s/GPU-bb2/2/ && exit'


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with three GPUs; asked for memory, the use of one is its number."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{MEMORY}\n{LISTED}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["A", "B", "C"]), ("2,0", ["C", "A"]), ("1", ["B"]), ("GPU-bb2, 0", ["B", "A"]),
        ("GPU-b", ["B"]), ("0,7,1", ["A"]), ("0,0,1", ["A"]), ("", []), ("-1", []), ("0,-1,1", ["A"]),
    ],
)  # fmt: skip
def test_the_gpus_that_a_process_may_see(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_names() == names
    assert [describe_device(f"cuda:{number}") for number in range(len(names))] == names
    assert resolve_device("auto") == ("cuda:0" if names else "cpu")
    assert has_gpu() is bool(names)


@pytest.mark.parametrize(
    ("visible", "number", "name"),
    [(None, 1, "1"), ("2,0", 0, "2"), ("2,0", 1, "0"), ("0,GPU-bb2", 1, "GPU-bb2"), ("2", 5, "5")],
)
def test_the_driver_is_asked_by_its_own_name(
    visible: str | None, number: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert driver_name(number) == name
    used = int(name.replace("GPU-bb2", "2")) * 1024**2
    assert device_memory(f"cuda:{number}") == DeviceMemory(used, 80000 * 1024**2)
