"""The page of deployments in Chromium: what may be changed while one serves. The records are stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.e2e.dashboard_visit import Visit, needs_chromium

pytestmark = needs_chromium

OTHER = "art_01ARZ3NDEKTSV4RRFFQ69G5FAV"
SMALL: dict[str, Any] = {
    "object": "deployment", "id": "dep_1", "name": "small", "artifact": "art_00000000000000000000000000",
    "engine": "auto", "state": "ready", "reason": "", "error": None, "idle_timeout_s": None, "aliases": [],
    "replicas": 1, "revision": 7, "generation": 1, "replacement": None, "servers": [], "job": None,
    "created_at": "2026-11-28T10:00:00Z", "links": {},
}  # fmt: skip


def opened(visit: Visit, **fields: object) -> tuple[Page, list[tuple[str | None, Any]]]:
    """The page with one such deployment; If-Match and body of each change that was sent."""
    sent: list[tuple[str | None, Any]] = []

    def reply(route: Route) -> None:
        if route.request.method == "PATCH":
            sent.append((route.request.headers.get("if-match"), route.request.post_data_json))
        route.fulfill(json=SMALL | fields)

    visit.page.route("**/v1/deployments/dep_1", reply)
    page_of = {"object": "list", "data": [SMALL | fields], "next_cursor": None, "has_more": False}
    visit.page.route("**/v1/deployments", lambda route: route.fulfill(json=page_of))
    page = visit.open("/deployments")
    expect(page.get_by_role("heading", name="small")).to_be_visible()
    return page, sent


def test_what_differs_is_sent_with_the_revision_that_was_read(visit: Visit) -> None:
    page, sent = opened(visit)
    page.get_by_role("button", name="Change").click()
    dialog = page.get_by_role("dialog", name="Change small")
    dialog.get_by_label("Replicas").fill("3")
    dialog.get_by_label("Artifact").fill(OTHER)
    dialog.get_by_label("Further names").fill("gpt-4o, tiny")
    dialog.get_by_role("button", name="Apply").click()
    expect(dialog).to_be_hidden()
    assert sent == [('"7"', {"replicas": 3, "artifact": OTHER, "aliases": ["gpt-4o", "tiny"]})]
    assert visit.faults() == []


@pytest.mark.parametrize(
    ("state", "label", "confirm", "paused"),
    [("ready", "Pause", "Pause", True), ("paused", "Resume", "Resume", False),
     ("failed", "Try again", "Try again", False)],
)  # fmt: skip
def test_a_deployment_is_stopped_and_started(
    visit: Visit, state: str, label: str, confirm: str, paused: bool
) -> None:
    page, sent = opened(visit, state=state)
    page.get_by_role("button", name=label).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name=confirm).click()
    expect(dialog).to_be_hidden()
    assert sent == [('"7"', {"paused": paused})]


@pytest.mark.parametrize(
    ("error", "text"),
    [(None, "Being replaced by"), ({"code": "cache_too_small", "message": "too little memory", "remedy": ""},
      "could not replace it: too little memory. The present one goes on serving.")],
)  # fmt: skip
def test_a_replacement_is_seen(visit: Visit, error: object, text: str) -> None:
    replacement = {
        "generation": 2,
        "served": {"artifact": OTHER, "engine": "auto"},
        "ready": 0,
        "error": error,
    }
    page, _ = opened(visit, replacement=replacement)
    expect(page.get_by_text(text)).to_be_visible()
    expect(page.get_by_role("link", name=OTHER)).to_be_visible()


def test_the_first_request_in_three_languages(visit: Visit) -> None:
    page, _ = opened(visit)
    page.get_by_text("Use the API").click()
    for language, line in (
        ("curl", "curl "),
        ("Python", "from openai import OpenAI"),
        ("JavaScript", "new OpenAI"),
    ):
        page.get_by_role("button", name=language, exact=True).click()
        expect(page.locator("pre")).to_contain_text(line)
        expect(page.locator("pre")).to_contain_text("small")
