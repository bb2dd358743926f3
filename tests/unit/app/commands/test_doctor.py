"""Checks of the host against things that are really broken."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.commands import doctor
from app.commands.checks import devices, host
from app.commands.checks.check import Check
from app.core.settings import Settings
from kernels.cuda.compiler import ARCHITECTURES


def run(capsys: pytest.CaptureFixture[str]) -> tuple[object, dict[str, dict[str, str]]]:
    """The exit code, and the checks by name."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    return ended.value.code, checks


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_sound_host_has_no_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NIBBLE_PORT", str(free_port()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(host, "LEAST_BYTES", 0)
    code, checks = run(capsys)
    assert list(checks) == [
        "python", "extra worker", "extra embedded", "pytorch", "gpu", "c++ compiler", "settings",
        "state folder", "cache folder", "disk", "model folders", "redis", "object storage", "port",
    ]  # fmt: skip
    problems = [check for check in checks.values() if check["status"] == "problem"]
    assert [check for check in problems if check["name"] != "disk"] == []
    assert code == (1 if problems else 0)
    assert not (tmp_path / "state" / "storage" / "doctor").exists(), "the probe was left behind"


def test_everything_that_is_broken_is_told_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU with a CPU build of PyTorch, a compiler that fails, folders that can't be written."""
    tools = tmp_path / "tools"
    program(tools, "nvidia-smi", "echo NVIDIA A")
    program(tools, "g++", "echo g++: fatal error: no cc1plus >&2; exit 1")
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("NIBBLE_STATE_DIR", "/proc/nibble")
    monkeypatch.setenv("NIBBLE_MODEL_ROOTS", str(tmp_path / "none"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NIBBLE_PORT", str(taken.getsockname()[1]))
        code, checks = run(capsys)
    assert code == 1
    broken = {
        "gpu": "built without CUDA", "c++ compiler": "no cc1plus", "state folder": "/proc/nibble",
        "cache folder": "/proc/.cache", "disk": "0 B free", "model folders": "No such file",
        "object storage": "/proc", "port": "in use",
    }  # fmt: skip
    import torch

    if torch.version.cuda is not None:  # then this host's driver decides what is told
        del broken["gpu"]
    for name, words in broken.items():
        assert checks[name]["status"] != "ok", name
        assert words in checks[name]["found"], name
        assert checks[name]["remedy"], name


def test_a_pytorch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.99: not found')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(Path(__file__).parents[4])
    check = devices.check_devices()[0]
    assert (check.name, check.status) == ("pytorch", "problem")
    assert "libcudart.so.99" in check.finding


def test_a_setting_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_LEASE_S", "soon")
    monkeypatch.setattr(devices, "probed", lambda: {"error": "not asked"})
    code, checks = run(capsys)
    assert code == 1
    assert "NIBBLE_LEASE_S='soon'" in checks["settings"]["found"]
    assert "redis" not in checks


@pytest.mark.parametrize("version", [(3, 10, 1), (3, 13, 0)])
def test_another_python(version: tuple[int, ...]) -> None:
    assert host.check_python(version).status == "problem"
    assert host.check_python(sys.version_info[:3]).status == "ok"


def test_a_disk_without_room(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "not" / "yet")
    assert host.check_disk(settings, room=10**18, least=0).status == "warning"
    assert host.check_disk(settings, room=10**18, least=10**18).status == "problem"
    assert host.check_disk(settings, room=0).status == "ok"


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.EXTRAS, "embedded", ("no_such_module",))
    check = host.check_extra("embedded")
    assert check.status == "warning"
    assert check.remedy == "pip install 'nibble[embedded]'"


DEVICE = {"name": "NVIDIA A", "capability": "9.0", "own_kernels": True}


@pytest.mark.parametrize(
    ("names", "facts", "hidden", "status", "words"),
    [
        ([], {}, None, "ok", "no NVIDIA GPU"),
        (["A"], {"torch_cuda": "13.0", "devices": [DEVICE]}, None, "ok", "compute capability 9.0"),
        (["A"], {"torch_cuda": None}, None, "problem", "without CUDA"),
        (["A"], {"torch_cuda": "13.0", "devices": []}, "", "problem", "CUDA_VISIBLE_DEVICES=''"),
        (["A"], {"torch_cuda": "13.0", "cuda_error": "driver too old"}, None, "problem", "driver too old"),
        (
            ["A"],
            {"torch_cuda": "13.0", "devices": [{**DEVICE, "own_kernels": False}]},
            None,
            "warning",
            "no kern",
        ),
    ],
)
def test_what_is_said_of_gpus(
    names: list[str], facts: dict[str, Any], hidden: str | None, status: str, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check = devices.check_driver(names, facts)
    assert (check.status, words in check.finding) == (status, True)
    assert check.remedy or status == "ok"


def test_a_driver_tool_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", "echo GPU-1, NVIDIA A; echo GPU-2, NVIDIA B")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert devices.gpu_names() == ["NVIDIA A", "NVIDIA B"]
    program(tmp_path, "nvidia-smi", "exit 9")
    assert devices.gpu_names() == []
    assert devices.check_driver([], {}).status == "warning"


KERNEL = {"architecture": "sm_80", "source": "decode.cu", "seconds": 0.5, "done": 1, "of": 9}


@pytest.mark.parametrize(
    ("last", "status", "finding"),
    [
        (
            {"compiler": "nvrtc 13.0", "folder": "cubins", "kernels": {"sm_80": 9, "sm_90a": 20}},
            "ok", "9 for sm_80, 20 for sm_90a in cubins, by nvrtc 13.0, in ",
        ),
        ({"error": "neither nvcc nor the NVRTC library was found"}, "warning",
         "neither nvcc nor the NVRTC library was found"),
        (KERNEL, "warning", "ended without an answer"),
    ],
)  # fmt: skip
def test_kernels_are_compiled_by_a_program_of_the_worker(
    monkeypatch: pytest.MonkeyPatch, last: dict[str, Any], status: str, finding: str
) -> None:
    asked: list[str] = []

    def answers(module: str) -> Iterator[dict[str, Any]]:
        asked.append(module)
        yield from (KERNEL, last)

    monkeypatch.setattr(devices, "answers_of", answers)
    heard: list[Mapping[str, Any]] = []
    check = devices.check_kernels(heard.append)
    assert (check.status, finding in check.finding) == (status, True)
    assert bool(check.remedy) == (status == "warning")
    assert asked == ["workers.devices.kernel_compilation"]
    assert heard[0] == KERNEL


NVCC = """
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.1" ;;
  *compute_120*search.cu*) [ -z "$FAULTY" ] || { echo "no such feature" >&2; exit 1; } ;;
esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo code > "$2"; shift; done
exit 0
"""


def test_the_compilation_is_told_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the program itself, for all architectures, with a compiler that is quick."""
    program(tmp_path, "nvcc", NVCC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("HOME", str(tmp_path))
    news = doctor.CompilationNews(doctor.stdout(), quiet=False)
    check = news.compile()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["compiled", name] for name in ARCHITECTURES]
    assert all(re.search(r"\d+ kernels in [\d.]+ s$", line) for line in lines)
    assert (check.status, "by nvcc 13.0.1, in " in check.finding) == ("ok", True)
    # What was compiled stays; a fault names its source and ends the compilation.
    cubins = tmp_path / ".cache" / "nibble" / "cubins"
    for file in cubins.glob("search-sm_120-*"):
        file.unlink()
    monkeypatch.setenv("FAULTY", "1")
    check = doctor.CompilationNews(doctor.stdout(), quiet=True).compile()
    assert (check.status, "search.cu failed" in check.finding) == ("warning", True)
    assert capsys.readouterr().out == ""


def test_kernels_are_compiled_after_the_other_checks_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes a minute: what is known by then is on the screen."""
    shown: list[str] = []

    def compiled(on_kernel: object) -> Check:
        shown.append(capsys.readouterr().out)
        return Check("kernels", "ok", "compiled")

    monkeypatch.setattr(doctor, "every_check", lambda: iter([Check("python", "ok", "3.11")]))
    monkeypatch.setattr(doctor, "check_kernels", compiled)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--compile"])
    assert (ended.value.code or 0) == 0
    assert "python" in shown[0]
    assert "kernels" in capsys.readouterr().out
