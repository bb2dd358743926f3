from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from app.commands.hub_token import read_hub_token
from app.core.errors import InvalidRequest
from tests.unit.app.canned import canned_service, run

TOKEN = "hf_secretsecret"
WHOLE = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
JOB = {"id": "job_1", "state": "queued", "created_at": "2026-01-01T00:00:00Z"}


def test_a_token_comes_from_a_file_standard_input_or_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    monkeypatch.setattr("sys.stdin", io.StringIO(TOKEN))
    assert [read_hub_token(each) for each in (str(tmp_path / "token"), "env:MY_TOKEN", "-")] == [TOKEN] * 3
    assert read_hub_token(None) is None


@pytest.mark.parametrize("place", [TOKEN, "env:NOBODYS", "/nowhere"])
def test_a_refusal_never_names_what_may_be_a_token(place: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_hub_token(place)
    assert TOKEN not in refused.value.message + refused.value.remedy
    assert "command line" in refused.value.remedy


@pytest.mark.parametrize(
    ("command", "route"),
    [
        (("submit", "a/b", "--push", "org/name"), "POST /v1/jobs"),
        (("estimate", "a/b"), "POST /v1/estimates"),
        (("retry", WHOLE), f"POST /v1/jobs/{WHOLE}/retry"),
    ],
)
def test_commands_send_the_token_in_the_body(tmp_path: Path, command: tuple[str, ...], route: str) -> None:
    (tmp_path / "token").write_text(TOKEN)
    answers: dict[str, tuple[int, object]] = {route: (200, JOB if "jobs" in route else {"candidates": []})}
    with canned_service(answers) as service:
        assert run(*command, "--hub-token", str(tmp_path / "token"), "--json", "--url", service.url) == 0
        ((_, headers, body),) = service.requests
    sent = json.loads(body)
    assert sent["hub_token"] == TOKEN
    assert TOKEN not in str(headers)
    assert sent.get("push") == ({"repo_id": "org/name"} if "submit" in command else None)
