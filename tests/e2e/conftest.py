"""One service and one browser for the tests of a file about the dashboard.

Both end with the file: as long as Playwright lives, its thread has a running event loop, and `asyncio.run` of
any other test of the process fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.e2e.dashboard_visit import CHROMIUM, PATIENCE_MS, QUIET, Visit
from tests.e2e.installed import Service, running_service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("dashboard"), repository / "examples") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, service: Service) -> Iterator[Visit]:
    visit = Visit(browser, service)
    yield visit
    visit.page.close()
    assert visit.complaints == []
