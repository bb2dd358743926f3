from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from app.core.planning.device_profile import NOMINAL
from workers.devices.kept_profile import circumstances, kept_profile, profiles_folder


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_device_is_measured_once_for_all_workers(tmp_path: Path) -> None:
    profile = kept_profile("cpu", "2 CPU threads", tmp_path)
    assert profile is not None
    assert (profile.measured, profile.device) == (True, "cpu")
    assert profile.search
    (kept,) = profiles_folder(tmp_path).iterdir()
    slower = profile.model_copy(update={"disk": 1.0})
    kept.write_text(slower.model_dump_json())
    other = tmp_path / "other"
    other.mkdir()
    assert kept_profile("cpu", "2 CPU threads", other) == slower


def test_other_threads_and_devices_are_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    known = {circumstances("2 CPU threads", tmp_path), circumstances("64 CPU threads", tmp_path)}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    known.add(circumstances("2 CPU threads", tmp_path))
    assert len(known) == 3


def test_a_device_that_cannot_be_measured_has_no_profile(tmp_path: Path) -> None:
    assert kept_profile("cuda:99", "none", tmp_path) is None


def test_a_cache_that_cannot_be_written_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file where a folder should be")
    answer = subprocess.CompletedProcess((), 0, stdout=NOMINAL["cpu"].model_dump_json() + "\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: answer)
    assert kept_profile("cpu", "2 CPU threads", tmp_path) == NOMINAL["cpu"]
    assert "can't be kept" in caplog.text


def test_a_user_without_a_home_keeps_it_with_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert profiles_folder(tmp_path) == tmp_path / "profiles"
