"""Members of `nibble up` as real small processes."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.commands import machine
from app.commands.checks import host
from app.commands.machine import Machine, Member
from app.commands.up_view import MeasuringNews, Voice
from app.core.errors import Unavailable
from app.core.jobs.worker_registry import WorkerRecord
from app.core.settings import Settings
from tests.waiting import wait_until

SLEEPER = "import time, sys; print('[up] and running', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Member]]:
    started: list[Member] = []

    def start_program(program: str) -> Member:
        (tmp_path / "program_under_test.py").write_text(program)
        member = Member("worker", "program_under_test", voice=Voice(as_json=False))
        member.start({**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
        started.append(member)
        return member

    yield start_program
    for member in started:
        member.stop()


def test_output_appears_behind_the_name(
    start: Callable[[str], Member], capfd: pytest.CaptureFixture[str]
) -> None:
    start(SLEEPER)
    seen = ""

    def arrived() -> bool:
        nonlocal seen
        seen += capfd.readouterr().out
        return "worker   | [up] and running" in seen

    wait_until(arrived)
    assert "\x1b" not in seen


def test_stop_ends_a_member_and_twice_is_once(start: Callable[[str], Member]) -> None:
    member = start(SLEEPER)
    member.stop()
    member.stop()
    assert member.exit_code() is not None


def test_stop_kills_a_member_that_ignores_it(
    start: Callable[[str], Member], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "STOP_GRACE_S", 0.2)
    member = start(STUBBORN)
    wait_until(lambda: "ready" in capfd.readouterr().out)
    member.stop()
    assert member.exit_code() == -9


def test_an_ended_member_is_named_with_its_code(start: Callable[[str], Member]) -> None:
    member = start("raise SystemExit(7)")
    wait_until(lambda: member.exit_code() is not None)
    with pytest.raises(Unavailable, match="worker ended with exit code 7"):
        machine.refuse_ended(member)


def test_crashes_in_a_row_are_counted_within_a_window() -> None:
    member = Member("worker", "nothing", voice=Voice(as_json=False))
    member.starts.extend(float(second) for second in range(machine.MAX_RESTARTS + 1))
    assert member.crashes_in_a_row()
    member.starts.append(1000.0)
    assert not member.crashes_in_a_row()


def test_one_worker_per_gpu_or_one_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_names", lambda: [])
    assert machine.worker_devices("serve") == [("serve", "cpu")]
    monkeypatch.setattr(machine, "gpu_names", lambda: ["A", "B"])
    assert machine.worker_devices("worker") == [("worker0", "cuda:0"), ("worker1", "cuda:1")]


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ANSWER_LIMIT_S", 0.2)  # who listens there says nothing
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(port=taken.getsockname()[1], state_dir=tmp_path / "state")
        with pytest.raises(Unavailable, match="in use") as caught:
            Machine(settings).run()
    assert "NIBBLE_PORT" in caught.value.remedy
    assert not (tmp_path / "state").exists()


def test_of_the_logs_only_warnings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "2026-11-28T10:00:00.000+00:00 INFO app.access: GET /v1/jobs 200",
        '{"at": "2026-11-28T10:00:00.000+00:00", "level": "info", "logger": "a", "message": "b"}',
        "2026-11-28T10:00:00.000+00:00 WARNING app: the disk is nearly full",
        "Traceback (most recent call last):",
    ]
    voice = Voice(as_json=False)
    for line in lines:
        voice.hear("api", line)
    assert capsys.readouterr().out.splitlines() == [f"api      | {line}" for line in lines[2:]]
    voice.show_tail("api")
    assert capsys.readouterr().out.splitlines() == [f"api      | {line}" for line in lines[:2]]
    voice.show_tail("api")
    for line in lines:
        Voice(as_json=False, verbose=True).hear("api", line)
    assert len(capsys.readouterr().out.splitlines()) == len(lines)


def test_the_box_leaves_links_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    link = "http://127.0.0.1:8420/login?code=" + "x" * 60
    Voice(as_json=False).show_ready("http://127.0.0.1:8420", link, "/state/api-key", "from the hub")
    lines = capsys.readouterr().out.splitlines()
    assert f"  {link}" in lines
    assert "ready at http://127.0.0.1:8420" in lines[0]


def test_measuring_is_told_once_with_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    facts = {
        "name": "w",
        "host": "h",
        "pid": 1,
        "device": "cpu",
        "started_at": moment,
        "heartbeat_at": moment,
    }
    news = MeasuringNews(Voice(as_json=False))
    for measuring in (False, True, True, False, False):
        news.look([WorkerRecord(**facts, measuring=measuring)])
    begun, ended = capsys.readouterr().out.splitlines()
    assert begun.startswith("measuring cpu once, for estimates: 0 s of at most 30 s")
    assert "measured in 0 s" in ended


def test_lines_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    Voice(as_json=True).say("nibble", "ready at x", style="green", event="ready", url="x")
    told = json.loads(capsys.readouterr().out)
    assert told == {"from": "nibble", "event": "ready", "url": "x", "line": "ready at x"}
