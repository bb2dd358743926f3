from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from app.cli import main
from app.commands import doctor
from app.core.settings import Settings


def test_every_check_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {
        "python",
        "extra worker",
        "extra embedded",
        "redis",
        "state folder",
        "disk",
        "devices",
    } <= checks.keys()
    assert ended.value.code == (1 if any(check["status"] == "problem" for check in checks.values()) else 0)


def test_a_state_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor.check_state(Settings(state_dir=tmp_path / "file" / "state"))
    assert check.status == "problem"
    assert "NIBBLE_STATE_DIR" in check.remedy


def test_a_used_port_is_a_warning() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check = doctor.check_port(Settings(port=taken.getsockname()[1]))
    assert check.status == "warning"
    assert "NIBBLE_PORT" in check.remedy


def test_an_unreachable_redis_is_a_problem_that_shows_no_password() -> None:
    check = doctor.check_redis(Settings(redis_url="redis://:hunter2@127.0.0.1:9/0"))
    assert check.status == "problem"
    assert "hunter2" not in check.found + check.remedy


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "embedded", ("no_such_module",))
    check = doctor.check_extra("embedded")
    assert check.status == "warning"
    assert check.remedy == "pip install 'nibble[embedded]'"


def test_gpu_names_come_from_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA A\necho NVIDIA B\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.gpu_names() == ["NVIDIA A", "NVIDIA B"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.gpu_names() == []
