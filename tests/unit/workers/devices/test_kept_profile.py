from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.core.planning.device_profile import NOMINAL, profile_of, rate_names
from tests.waiting import wait_until
from workers.devices import kept_profile as module
from workers.devices.kept_profile import Measurement, OthersUse, circumstances, profiles_folder

NAMES = rate_names("cpu")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "QUIET", math.inf)  # other tests run beside these
    return tmp_path / "home"


@pytest.fixture
def measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has another module measure: the real one takes seconds, which no test can stop at a certain rate."""

    def by(program: str) -> None:
        (tmp_path / "stand_in_measurement.py").write_text(f"import sys, time\n{program}\n")
        monkeypatch.setattr(module, "MODULE", "stand_in_measurement")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")

    return by


def line(*names: str) -> str:
    return f"print('{{' + ', '.join(f'\"{{name}}\": 7.0' for name in {names!r}) + '}}', flush=True)"


def run_out(measurement: Measurement) -> None:
    def is_over() -> bool:
        measurement.go_on()
        return measurement.is_over

    wait_until(is_over)
    assert not measurement.is_running


def test_a_device_is_measured_once_for_all_workers(tmp_path: Path) -> None:
    first = Measurement("cpu", "2 CPU threads", tmp_path, limit_s=600)
    assert (first.profile, first.is_over) == (None, False)
    run_out(first)
    profile = first.profile
    assert profile is not None
    assert (profile.basis, profile.device, profile.assumed) == ("measured", "cpu", ())
    assert all(rate > 0 for rate in profile.matmul_float32.values())
    assert list(profiles_folder(tmp_path).iterdir()) != []
    other = tmp_path / "other"
    other.mkdir()
    second = Measurement("cpu", "2 CPU threads", other)
    assert (second.profile, second.is_over) == (profile, True)


def test_what_is_measured_on_a_busy_host_is_not_kept(
    tmp_path: Path,
    measures: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "QUIET", -1.0)
    measures(line(*NAMES))
    measurement = Measurement("cpu", "a busy host", tmp_path, limit_s=600)
    run_out(measurement)
    assert measurement.missing == []
    assert "was measured while others used" in caplog.text
    assert Measurement("cpu", "a busy host", tmp_path).missing == list(NAMES)


def test_rates_of_a_busy_round_are_not_kept_with_those_of_a_quiet_one(
    tmp_path: Path, measures: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    measures(f"{line(NAMES[0])}\ntime.sleep(600)")
    measurement = Measurement("cpu", "a host with jobs", tmp_path, limit_s=600)
    measurement.go_on()
    wait_until(lambda: measurement.profile is not None)
    with monkeypatch.context() as busy:
        busy.setattr(module, "QUIET", -1.0)
        measurement.pause()
    measures(line(*NAMES[1:]))
    run_out(measurement)
    assert measurement.missing == []
    assert Measurement("cpu", "a host with jobs", tmp_path).missing == list(NAMES)


def test_what_this_process_uses_is_no_measurement() -> None:
    others, began = OthersUse(), time.process_time()
    while time.process_time() - began < 0.3:
        pass
    assert others.share() > 0


def test_measuring_ends_when_the_time_is_up(
    tmp_path: Path, measures: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    measures(f"{line(*NAMES[:3])}\ntime.sleep(600)")
    measurement = Measurement("cpu", "a busy host", tmp_path, limit_s=5)
    began = time.monotonic()
    run_out(measurement)
    assert time.monotonic() - began > 5
    assert measurement.missing == list(NAMES[3:])
    assert measurement.profile is not None
    assert (measurement.profile.basis, measurement.profile.assumed) == ("measured in part", NAMES[3:])
    assert "5 s were not enough to measure all rates" in caplog.text
    assert NAMES[3] in caplog.text
    again = Measurement("cpu", "a busy host", tmp_path)  # the next worker goes on with the rest
    assert (again.missing, again.is_over) == (list(NAMES[3:]), False)


def test_a_pause_stops_it_at_once_and_it_goes_on_with_what_is_missing(
    tmp_path: Path, measures: Callable[[str], None]
) -> None:
    measures(f"{line(NAMES[0])}\ntime.sleep(600)")
    measurement = Measurement("cpu", "a host with jobs", tmp_path, limit_s=600)
    measurement.go_on()
    assert measurement.is_running
    wait_until(lambda: measurement.profile is not None)
    began = time.monotonic()
    measurement.pause()
    assert time.monotonic() - began < 2  # an arriving job is not held up
    assert not measurement.is_running
    assert measurement.missing == list(NAMES[1:])
    measures(f"assert '{NAMES[0]}' in sys.argv, sys.argv\n{line(*NAMES[1:])}")
    run_out(measurement)
    assert measurement.missing == []


def test_pauses_do_not_give_more_time(tmp_path: Path, measures: Callable[[str], None]) -> None:
    measures("time.sleep(600)")
    measurement = Measurement("cpu", "a host with many jobs", tmp_path, limit_s=0.5)
    for _ in range(2):
        measurement.go_on()
        time.sleep(0.3)
        measurement.pause()
    measurement.go_on()
    measurement.go_on()
    assert measurement.is_over
    assert measurement.profile is None


def test_a_device_that_cannot_be_measured_has_no_profile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measurement = Measurement("cuda:99", "none", tmp_path, limit_s=600)
    run_out(measurement)
    assert measurement.profile is None
    assert "cuda:99 could not be measured; estimates use nominal rates" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"disk": "fast"}', NOMINAL["cpu"].model_dump_json()])
def test_a_cache_that_cannot_be_read_is_measured_anew(home: Path, tmp_path: Path, content: str) -> None:
    folder = profiles_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / f"cpu-{circumstances('2 CPU threads', tmp_path)}.json").write_text(content)
    assert Measurement("cpu", "2 CPU threads", tmp_path).missing == list(NAMES)


def test_other_threads_and_devices_are_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    known = {circumstances("2 CPU threads", tmp_path), circumstances("64 CPU threads", tmp_path)}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    known.add(circumstances("2 CPU threads", tmp_path))
    assert len(known) == 3


def test_a_cache_that_cannot_be_written_is_told(
    home: Path, tmp_path: Path, measures: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file where a folder should be")
    measures(line(*NAMES))
    measurement = Measurement("cpu", "2 CPU threads", tmp_path, limit_s=600)
    run_out(measurement)
    assert measurement.profile is not None
    assert "can't be kept" in caplog.text


def test_a_user_without_a_home_keeps_it_with_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert profiles_folder(tmp_path) == tmp_path / "profiles"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_not_measured_is_assumed_at_the_pace_of_what_is(kind: str) -> None:
    device = "cpu" if kind == "cpu" else "cuda"
    nominal, names = NOMINAL[device], rate_names(device)
    assert profile_of(device, {}) == nominal
    assert nominal.basis == "nominal"
    twice = 2 * nominal.matmul_rate(256, float32=True)
    half = profile_of(device, {"matmul_float32 256": twice})
    assert (half.basis, len(half.assumed)) == ("measured in part", len(names) - 1)
    assert half.matmul_rate(256, float32=True) == twice
    assert half.matmul_rate(256) == pytest.approx(2 * nominal.matmul_rate(256))
    assert half.search_seconds("clip", 4096) == pytest.approx(nominal.search_seconds("clip", 4096) / 2)
    full = profile_of(device, dict.fromkeys(names, 3.0))
    assert (full.basis, full.assumed) == ("measured", ())
    assert (full.disk, full.search_seconds("gptq", 512)) == (3.0, 3.0)
