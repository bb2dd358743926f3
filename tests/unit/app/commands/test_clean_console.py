"""What others wrote can't steer the terminal that shows it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from app.commands.clean_console import printable
from tests.unit.app.canned import Canned, canned_service, run
from tests.unit.app.test_cli_contract import ANSWERS, ARGUMENTS, EVENT, JOB, PAGE, in_terminal

# A title, a bell, a colour, the start of the line, a colour of one byte, and text that runs backwards.
EVIL = "\x1b]0;title\x07 \x1b[31mred \rover \x9b32m \u202ebackwards"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Fields by which something is looked up, or that have a form of their own.
EXACT = {
    "id", "job", "artifact", "state", "object", "created_at", "at", "expires_at", "path", "next", "kind",
    "artifacts", "finished_at", "started_at", "heartbeat_at", "name",
}  # fmt: skip


def poisoned(document: Any, key: str = "") -> Any:
    """The document with EVIL after each text that nothing is looked up by."""
    if isinstance(document, dict):
        return {name: poisoned(value, name) for name, value in document.items()}
    if isinstance(document, list):
        return [poisoned(value, key) for value in document]
    return document + EVIL if isinstance(document, str) and key not in EXACT else document


@pytest.fixture
def service() -> Iterator[Canned]:
    failed = {
        **JOB, "state": "failed", "artifacts": [],
        "error": {"code": "weights_bad", "message": "m", "remedy": "look"}, "labels": {"team": "a"},
    }  # fmt: skip
    report = {
        "model": "a/b", "original": {"bytes": 4, "perplexity": 2.0}, "notes": ["a note"],
        "candidates": [{"label": "awq w4", "bytes": {"awq": 2}, "perplexity": 2.0, "perplexity_ratio": 1.0}],
    }  # fmt: skip
    output = {**EVENT, "kind": "failure", "payload": {"code": "c", "output": "a line\nanother"}}
    worker = {
        "name": "w", "queue": "jobs", "state": "idle", "device": "cpu", "device_name": "CPU",
        "heartbeat_at": "2026-01-01T00:00:00Z", "host": "h", "started_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    answers = copy.deepcopy(ANSWERS) | {
        "GET /v1/jobs": (200, {**PAGE, "data": [failed]}),
        "GET /v1/jobs/job_1/report": (200, report),
        "GET /v1/workers": (200, {**PAGE, "data": [worker]}),
        "GET /v1/jobs/job_1/events": (200, {**PAGE, "data": [EVENT, output]}),
    }
    answers = {route: (status, poisoned(answer)) for route, (status, answer) in answers.items()}
    with canned_service(answers) as canned:
        yield canned


# Their words are printed by other commands as well.
ELSEWHERE = {"deployments delete", "events", "datasets upload", "artifacts download"}


@pytest.mark.parametrize("command", [name for name in ARGUMENTS if name not in ELSEWHERE])
def test_control_characters_of_others_are_left_out(
    command: str, service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "chat":
        chunk = {"choices": [{"delta": {"content": f"hello{EVIL}"}}], "usage": {"completion_tokens": 2}}
        service.answers["POST /v1/chat/completions"] = (200, f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")
    assert run(*command.split(), *ARGUMENTS[command], "--url", service.url) == 0
    shown = capsys.readouterr()
    assert not STEERING.search(shown.out + shown.err)
    assert shown.out + shown.err


def test_errors_questions_and_statuses_are_clean(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    problem = {"detail": f"no{EVIL}", "code": f"c{EVIL}", "remedy": f"look{EVIL}"}
    service.answers["GET /v1/jobs/job_1/report"] = (404, problem)
    assert run("report", "job_1", "--url", service.url) == 1
    said = capsys.readouterr().err
    assert "red over" in said
    assert not STEERING.search(said)


def test_the_terminal_gets_its_own_colours_alone(service: Canned) -> None:
    shown = in_terminal("jobs", "--url", service.url)
    assert "\x1b[31mfailed" in shown
    assert not re.search(r"\x1b\]|\x07|\x1b\[31mred|\x9b", shown)


def test_half_a_character_can_be_printed() -> None:
    assert printable("a\ud83db") == "a\N{REPLACEMENT CHARACTER}b"
    assert printable("a\tb\nc é 漢 🙂") == "a\tb\nc é 漢 🙂"


def test_json_holds_what_the_service_said(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "job_1", "--json", "--url", service.url) == 0
    line = capsys.readouterr().out
    assert not STEERING.search(line)
    assert json.loads(line)["notes"] == [f"a note{EVIL}"]


def test_columns_stay_straight(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    job = {**JOB, "spec": {"model": "a/\x1b[31mb"}}
    service.answers["GET /v1/jobs"] = (200, {**PAGE, "data": [job, {**JOB, "spec": {"model": "a/longer"}}]})
    assert run("jobs", "--url", service.url) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.index(" d") == second.index(" d")  # the ages end alike
