"""The dashboard's lists in Chromium: search, counts, order, selection, comparison, and who may do what."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from app.core.access.api_keys import Scope
from tests.e2e.dashboard_visit import Visit, call, job_store, needs_chromium, visit_with
from tests.e2e.history import fill
from tests.e2e.installed import Service
from tests.e2e.results import LAYERS, finished, forget, layer_done, running

pytestmark = needs_chromium

TYPING_MS = 150  # between keys, as people type


@pytest.fixture
def moving(service: Service) -> Iterator[str]:
    """A job that runs, so that lists are polled every two seconds."""
    with job_store(service) as store:
        job = running(store)
        yield job
        forget(store, job)


def test_polls_leave_what_is_typed(visit: Visit, moving: str) -> None:
    """While a job moves, the list is polled and drawn again and again."""
    page = visit.open("/jobs")
    expect(page.locator(f"[data-job={moving}]")).to_be_visible()
    field = page.get_by_role("searchbox")
    field.click()
    with page.expect_response(lambda answer: "/v1/jobs?" in answer.url), job_store(visit.service) as store:
        field.press_sequentially("ours/run", delay=TYPING_MS)
        layer_done(store, moving, 2)
        field.press_sequentially("ning", delay=TYPING_MS)
    expect(page.locator("li[data-job]")).to_have_count(1)
    with page.expect_response(lambda answer: "/v1/jobs?" in answer.url), job_store(visit.service) as store:
        layer_done(store, moving, 3)
    expect(page.get_by_text(f"layer 4 of {LAYERS}")).to_be_visible()
    assert field.input_value() == "ours/running"
    expect(field).to_be_focused()
    # The filter is in the address: it is there again after a reload, and can be passed on.
    assert "q=ours%2Frunning" in page.url
    page.reload()
    expect(field).to_have_value("ours/running")
    expect(page.locator("li[data-job]")).to_have_count(1)


def test_states_are_counted_and_chosen(visit: Visit) -> None:
    with job_store(visit.service) as store:
        fill(store, 10)
    page = visit.open("/jobs")
    counts = call(visit.service, "/v1/jobs?counts=true", method="GET")["counts"]
    chip = page.get_by_text(re.compile(rf"^failed {counts['failed']}$"))
    expect(chip).to_be_visible()
    page.get_by_role("radio", name="failed").focus()
    page.keyboard.press("Space")
    expect(page.locator("li[data-job] .state-succeeded")).to_have_count(0)
    expect(page.locator("li[data-job]")).to_have_count(min(25, counts["failed"]))
    assert "state=failed" in page.url
    assert visit.faults() == []


def test_jobs_are_put_in_order(visit: Visit) -> None:
    with job_store(visit.service) as store:
        large = finished(visit.service, store, [{"method": "gptq", "bits": 2}])
        small = finished(visit.service, store, [{"method": "rtn", "bits": 8}])
    page = visit.open("/jobs?q=ours/small")
    rows = page.locator("li[data-job]")
    expect(rows.first).to_have_attribute("data-job", small)
    expect(rows.first).to_contain_text("MB")
    expect(rows.first).to_contain_text("\N{MINUS SIGN}0.27 %")
    page.get_by_label("Sort").select_option("oldest")
    expect(rows.last).to_have_attribute("data-job", small)
    assert "sort=oldest" in page.url
    assert large in rows.evaluate_all("rows => rows.map((row) => row.dataset.job)")


def test_several_jobs_are_compared_and_deleted(visit: Visit) -> None:
    with job_store(visit.service) as store:
        jobs = [
            finished(visit.service, store),
            finished(visit.service, store, [{"method": "awq"}], windows=4),
        ]
    page = visit.open("/jobs")
    for job in jobs:
        page.get_by_label(f"Select {job}").check()
    expect(page.get_by_text("2 jobs selected")).to_be_visible()
    assert visit.faults() == []
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Compare 2 jobs")
    table = page.get_by_role("region", name="All candidates")
    expect(table.get_by_role("row")).to_have_count(1 + 7)
    expect(table).to_contain_text("best")
    expect(page.locator(".point")).to_have_count(1 + 7)
    expect(page.get_by_role("region", name="What differs between the jobs")).to_contain_text(
        "4 windows of 128"
    )
    expect(page.get_by_text("perplexities can't be compared")).to_be_visible()
    assert visit.faults() == []
    page.go_back()
    for job in jobs:
        page.get_by_label(f"Select {job}").check()
    page.get_by_role("button", name="Delete 2 jobs").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete 2 jobs").click()
    expect(page.locator(f"[data-job={jobs[0]}]")).to_have_count(0)
    left = {job["id"] for job in call(visit.service, "/v1/jobs?limit=100", method="GET")["data"]}
    assert not left & set(jobs)
    expect(page.get_by_role("region", name="Selected jobs")).to_have_count(0)


def test_several_running_jobs_are_cancelled(visit: Visit, moving: str) -> None:
    page = visit.open("/jobs")
    page.get_by_label(f"Select {moving}").check()
    page.get_by_role("button", name="Cancel 1 job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel 1 job").click()
    expect(page.locator(f"[data-job={moving}] .state-cancelling")).to_be_visible()


def test_a_key_that_reads_sees_no_other_buttons(browser: Browser, service: Service) -> None:
    with job_store(service) as store:
        job = finished(service, store)
    page = visit_with(browser, service, Scope.JOBS_READ)
    expect(page.locator(f"[data-job={job}]")).to_be_visible()
    expect(page.get_by_role("link", name="New job")).to_have_count(0)
    expect(page.get_by_role("checkbox")).to_have_count(0)
    assert page.get_by_role("navigation").get_by_role("link").all_text_contents() == ["Jobs", "Workers"]
    page.goto(f"{service.url}/#/jobs/{job}")
    expect(page.get_by_role("heading", name="Report")).to_be_visible()
    for name in ("Run again", "Delete", "Deploy", "Cancel job"):
        expect(page.get_by_role("button", name=name)).to_have_count(0)
    expect(page.get_by_role("link", name="Use as template")).to_have_count(0)
    page.goto(f"{service.url}/#/jobs/new")
    expect(page.get_by_text("This key can't submit jobs.")).to_be_visible()
    page.close()


def test_who_is_signed_in_and_the_way_out(browser: Browser, service: Service) -> None:
    visit = Visit(browser, service)
    page = visit.open("/jobs")
    caller = call(service, "/v1/whoami", method="GET")
    page.get_by_text("Account").focus()
    page.keyboard.press("Enter")
    menu = page.locator(".account-menu")
    for text in (caller["tenant"], caller["key"], caller["version"]):
        expect(menu).to_contain_text(text)
    assert visit.faults() == []
    page.keyboard.press("Escape")
    expect(menu).to_be_hidden()
    page.keyboard.press("Enter")
    menu.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.goto(f"{service.url}/#/jobs")
    expect(page.get_by_label("API key")).to_be_focused()
    page.close()


@pytest.mark.parametrize(
    ("scope", "heading"),
    [(Scope.ARTIFACTS_READ, "Artifacts"), (Scope.DEPLOYMENTS_READ, "Deployments"), (Scope.ADMIN, "Jobs")],
)
def test_the_first_page_is_one_that_the_key_may_see(
    browser: Browser, service: Service, scope: Scope, heading: str
) -> None:
    page = visit_with(browser, service, scope)
    expect(page.get_by_role("heading", name=heading, level=1)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("link", name="Nibble").click()
    expect(page.get_by_role("heading", name=heading, level=1)).to_be_visible()
    page.close()
