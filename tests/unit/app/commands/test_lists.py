"""Every list of the terminal ends with the command for its next page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from app.core.settings import Settings
from app.main import create_app
from tests.unit.app.canned import Canned, canned_service, run
from tests.unit.app.test_cli_contract import ANSWERS, every_command

# Each list with its route, and with words that choose among its entries.
LISTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "jobs": ("/v1/jobs", ("--state", "failed", "--label", "team=a b")),
    "artifacts": ("/v1/artifacts", ("--tag", "production")),
    "registry": ("/v1/registry", ("org/name",)),
    "datasets list": ("/v1/datasets", ("--sequence-length", "64")),
    "deployments": ("/v1/deployments", ()),
    "audit": ("/v1/audit", ("POST", "a key", "--since", "2026-11-01")),
    "webhooks list": ("/v1/webhook-deliveries", ("--state", "failed")),
}
# Answered whole: there is no next page.
WHOLE = {"keys list": "/v1/keys", "workers": "/v1/workers"}
# No list of the terminal: events are followed.
ELSEWHERE = {"/v1/jobs/{job_id}/events"}


@pytest.fixture
def service() -> Iterator[Canned]:
    with canned_service(dict(ANSWERS)) as canned:
        yield canned


def test_what_the_service_cuts_the_terminal_can_continue() -> None:
    """A route that takes `after` has a command that takes --after; one without has none."""
    routes = create_app(Settings()).openapi()["paths"]
    paged = {
        path for path, methods in routes.items()
        if any(each["name"] == "after" for each in methods.get("get", {}).get("parameters", ()))
    }  # fmt: skip
    assert paged - ELSEWHERE == {route for route, _ in LISTS.values()}
    assert set(WHOLE.values()) <= routes.keys() - paged
    continued = {
        name for name, command in every_command().items()
        if any("--after" in option.opts for option in command.params)
    }  # fmt: skip
    limited = {
        name for name, command in every_command().items()
        if any("--limit" in option.opts for option in command.params)
    }  # fmt: skip
    assert continued == limited == LISTS.keys()


@pytest.mark.parametrize("command", LISTS)
def test_a_cut_list_prints_the_command_for_the_rest(
    command: str, service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    route, words = LISTS[command]
    entry: Any = ANSWERS[f"GET {route}"][1]
    service.answers[f"GET {route}"] = (200, {**entry, "has_more": True, "next": "cursor 1"})
    asked = [*command.split(), *words, "--limit", "7", "--url", service.url]
    assert run(*asked, "--api-key", "secret") == 0
    typed = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("more: "))
    assert typed[0] == "nibble"
    assert "secret" not in typed
    assert run(*typed[1:]) == 0
    capsys.readouterr()
    first, second = (each for each, _, _ in service.requests if each.startswith(f"GET {route}"))
    assert set(re.split(r"[?&]", second)) == {*re.split(r"[?&]", first), "after=cursor+1"}
    service.answers[f"GET {route}"] = (200, entry)
    assert run(*asked) == 0
    assert "more: " not in capsys.readouterr().out


@pytest.mark.parametrize("command", [*LISTS, *WHOLE])
def test_an_empty_list_says_so(command: str, service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    route = LISTS[command][0] if command in LISTS else WHOLE[command]
    service.answers[f"GET {route}"] = (200, {"data": [], "has_more": False})
    assert run(*command.split(), "--url", service.url) == 0
    assert capsys.readouterr().out.startswith("none")


def test_filters_of_all_jobs_are_refused_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("webhooks", "list", "job_1", "--state", "failed") == 2
    assert "--state" in capsys.readouterr().err
