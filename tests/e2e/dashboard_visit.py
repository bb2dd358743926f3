"""A visitor of the dashboard: a signed-in page in Chromium, and what the tests do beside it."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from app.core.access.api_keys import Scope
from app.core.jobs.job_store import JobStore
from app.core.redis.redis_server import connect, resolve_redis
from app.core.settings import Settings
from tests.e2e.installed import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE_MS = 60_000  # what a busy host may take for what is otherwise there in a moment

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


class Visit:
    """A signed-in page that notes what the browser complains about."""

    def __init__(self, browser: Browser, service: Service, **options: object) -> None:
        self.page: Page = browser.new_page(**options)  # type: ignore[arg-type]
        self.service = service
        self.complaints: list[str] = []
        self.sizes: dict[str, int] = {}
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(service.url + login_path(service))

    def _note(self, kind: str, text: str) -> None:
        # A refused form is a 4xx answer, which Chromium reports as a failed resource.
        if kind in ("error", "warning") and "status of 4" not in text:
            self.complaints.append(text)

    def forgive_network(self) -> None:
        """Of a test that takes the network away, Chromium complains about just that."""
        assert all("net::ERR_" in text for text in self.complaints), self.complaints
        self.complaints.clear()

    def open(self, path: str) -> Page:
        self.page.goto(f"{self.service.url}/#{path}")
        return self.page

    def faults(self) -> list[str]:
        """All faults that axe finds on the page as it is, also those of little weight."""
        found = Axe().run(self.page).response["violations"]
        return [f"{fault['id']}: {node['html']}" for fault in found for node in fault["nodes"]]


def visit_with(browser: Browser, service: Service, *scopes: Scope) -> Page:
    """A page of someone whose key has these scopes."""
    key = call(service, "/v1/keys", {"scopes": scopes})["key"]
    page = browser.new_page()
    page.goto(service.url)
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("Account")).to_be_visible()
    return page


def api_key(service: Service) -> str:
    return (Path(service.environment["NIBBLE_STATE_DIR"]) / "api-key").read_text().strip()


def call(service: Service, path: str, body: object = None, *, method: str = "POST") -> dict[str, Any]:
    request = urllib.request.Request(
        service.url + path,
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Authorization": f"Bearer {api_key(service)}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))


def login_path(service: Service) -> str:
    return str(call(service, "/v1/login-links")["path"])


@contextmanager
def job_store(service: Service) -> Iterator[JobStore]:
    with resolve_redis(Settings(state_dir=Path(service.environment["NIBBLE_STATE_DIR"]))) as redis:
        yield JobStore(connect(redis.url))
