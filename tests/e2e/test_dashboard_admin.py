"""The pages of administration in Chromium, and the page of the API: a live service, a live browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from app.core.access.api_keys import Scope
from tests.e2e.dashboard_visit import Visit, api_key, call, needs_chromium
from tests.e2e.installed import Service, running_service
from tests.servers import running
from tests.waiting import wait_until

pytestmark = needs_chromium

AREAS = {
    "keys": "API keys", "limits": "Limits", "audit": "Audit log", "webhooks": "Webhooks",
    "storage": "Storage", "settings": "Settings",
}  # fmt: skip
WIDE = {"viewport": {"width": 2560, "height": 1200}}  # looks like a desktop otherwise
LOOKS = (
    {"color_scheme": "light"},
    {"color_scheme": "dark"},
    {"viewport": {"width": 320, "height": 700}},
    WIDE,
)
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"


class Receiver(BaseHTTPRequestHandler):
    """Of webhooks: refuses what it is sent."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(418)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[str]:
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Receiver)) as server:
        yield f"http://127.0.0.1:{server.server_port}/hook"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIBBLE_OUTGOING_NETWORKS", "127.0.0.0/8")
        patch.setenv("NIBBLE_OTLP_HEADERS", "x-api-key=word-of-the-collector")
        with running_service(tmp_path_factory.mktemp("admin"), repository / "examples") as service:
            yield service


def signed_in(browser: Browser, service: Service, *scopes: Scope, tenant: str = "default") -> Page:
    """A page of someone whose key has these scopes."""
    key = call(service, "/v1/keys", {"scopes": scopes, "tenant": tenant})["key"]
    page = browser.new_page()
    page.goto(service.url)
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("link", name="Nibble")).to_be_visible()
    expect(page.get_by_text("Account")).to_be_visible()
    return page


def row(page: Page, text: str) -> Locator:
    return page.get_by_role("row").filter(has_text=text)


def test_a_key_is_created_copied_used_and_revoked(visit: Visit) -> None:
    page = visit.open("/jobs")
    page.get_by_role("navigation", name="Sections").get_by_role("link", name="Administration").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("API keys")
    page.get_by_role("button", name="New key").press("Enter")
    dialog = page.get_by_role("dialog", name="New API key")
    expect(dialog.get_by_label("Name")).to_be_focused()
    page.keyboard.type("of a test")
    for scope in ("jobs:read", "jobs:write"):
        dialog.get_by_role("checkbox", name=scope).press("Space")
    assert visit.faults() == []
    dialog.get_by_role("button", name="Create").press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("at least one scope")
    dialog.get_by_role("checkbox", name="jobs:read").check()
    dialog.get_by_role("textbox", name="Tenant").fill("research")
    dialog.get_by_role("button", name="Create").press("Enter")
    expect(page.get_by_role("heading", name="Copy the key of a test now")).to_be_focused()
    secret = page.get_by_label("The new key").inner_text()
    assert re.fullmatch(r"nib_[0-9a-f]{16}_[0-9a-f]{64}", secret)
    assert visit.faults() == []
    created = row(page, "of a test")
    for text in ("jobs:read", "research", "never"):
        expect(created).to_contain_text(text)
    page.get_by_role("button", name="I have copied it").click()
    expect(page.get_by_text(secret)).to_have_count(0)
    assert secret not in page.content()
    created.get_by_role("button", name="Revoke").click()
    question = page.get_by_role("dialog", name="Revoke of a test?")
    assert visit.faults() == []
    question.get_by_role("button", name="Cancel").click()
    expect(created).to_be_visible()
    created.get_by_role("button", name="Revoke").click()
    question.get_by_role("button", name="Revoke").click()
    expect(created).to_have_count(0)
    keys = call(visit.service, "/v1/keys", method="GET")["data"]
    assert "of a test" not in [key["name"] for key in keys]


def test_the_key_of_the_session_is_marked_and_its_end_announced(visit: Visit) -> None:
    page = visit.open("/admin/keys")
    own = row(page, "yours")
    expect(own).to_contain_text("first key")
    own.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("dialog")).to_contain_text("you will be signed out")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(own.get_by_role("button", name="Revoke")).to_be_focused()


def test_limits_are_shown_beside_use_and_changed(visit: Visit) -> None:
    call(visit.service, "/v1/keys", {"scopes": ["jobs:read"], "tenant": "team"})
    page = visit.open("/admin/limits")
    page.get_by_role("combobox", name="Tenant").select_option("team")
    expect(page.get_by_text("What the tenant team may use")).to_be_visible()
    assert "tenant=team" in page.url
    expect(row(page, "Storage")).to_contain_text("no limit")
    page.get_by_role("button", name="Change limits").click()
    dialog = page.get_by_role("dialog", name="Limits of team")
    dialog.get_by_label("Storage in GB").fill("1.5")
    dialog.get_by_label("Jobs that have not ended").fill("-1")
    dialog.get_by_role("button", name="Apply").click()
    expect(dialog).to_be_visible()  # the browser refuses it
    # Another operator's change since the page was read stays.
    path = "/v1/tenants/team/limits"
    call(visit.service, path, {"requests_per_minute": 90}, method="PUT")
    dialog.get_by_label("Jobs that have not ended").fill("0")
    assert visit.faults() == []
    dialog.get_by_role("button", name="Apply").click()
    expect(row(page, "Storage")).to_contain_text("1.5 GB")
    assert call(visit.service, path, method="GET")["limits"] == {
        "active_jobs": 0, "running_jobs": 0, "storage_bytes": 1_500_000_000, "requests_per_minute": 90,
    }  # fmt: skip


def test_a_limit_that_the_service_refuses_is_told_in_the_dialog(visit: Visit) -> None:
    page = visit.open("/admin/limits")
    page.get_by_role("button", name="Change limits").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Requests per minute").fill("99000000")
    dialog.get_by_role("button", name="Apply").click()
    expect(dialog.get_by_role("alert")).to_contain_text("10000000")
    assert visit.faults() == []


def test_the_audit_log_is_filtered_and_read_in_pages(visit: Visit) -> None:
    service = visit.service
    for _ in range(60):
        call(service, "/v1/login-links")
    for number in range(3):
        call(service, "/v1/tenants/searched/limits", {"active_jobs": number}, method="PUT")
    page = visit.open("/admin/audit")
    entries = page.locator("details.entry")
    expect(entries).to_have_count(50)
    page.get_by_role("button", name="Show older changes").press("Enter")
    expect(entries.nth(60)).to_be_attached()
    page.get_by_role("searchbox").fill("put searched")
    expect(entries).to_have_count(3)
    assert "q=put+searched" in page.url
    entries.first.locator("summary").press("Enter")
    facts = entries.first.locator("dl")
    for text in ("HTTP 200", "first key", "Request"):
        expect(facts).to_contain_text(text)
    assert visit.faults() == []
    page.get_by_label("Refused only").check()
    expect(page.get_by_role("heading", name="No such changes")).to_be_visible()
    page.get_by_label("Refused only").uncheck()
    page.get_by_label("Time").select_option("last hour")
    expect(entries).to_have_count(3)
    other = call(service, "/v1/keys", {"scopes": ["jobs:read"], "name": "idle"})["id"]
    page.reload()
    page.get_by_role("combobox", name="Key").select_option(other)
    expect(page.get_by_role("heading", name="No such changes")).to_be_visible()
    assert {f"key={other}", "since=1", "q=put+searched"} <= set(page.url.partition("?")[2].split("&"))


def job_with_webhook(service: Service, url: str) -> str:
    """A job that ends at once, of whose end the receiver is told."""
    model = Path(service.environment["NIBBLE_MODEL_ROOTS"]) / "wikitext-llama-6m"
    webhook = {"url": url, "events": ["job.cancelled"]}
    job = str(call(service, "/v1/jobs", {"model": model.as_uri(), "webhook": webhook})["id"])
    call(service, f"/v1/jobs/{job}/cancel")
    return job


def tries(service: Service, job: str) -> list[object]:
    """Those of the job's first webhook."""
    deliveries = call(service, f"/v1/jobs/{job}/webhook-deliveries", method="GET")["data"]
    return list(deliveries[0]["tries"]) if deliveries else []


def test_deliveries_are_shown_with_their_attempts_and_sent_again(visit: Visit, receiver: str) -> None:
    job = job_with_webhook(visit.service, receiver)
    wait_until(lambda: len(tries(visit.service, job)) > 0, 60)
    page = visit.open("/admin/webhooks")
    sent = row(page, job)
    for text in ("job.cancelled", "pending", receiver, "HTTP 418"):
        expect(sent).to_contain_text(text)
    sent.locator("summary").press("Enter")
    expect(sent.get_by_role("listitem").first).to_contain_text("HTTP 418, after")
    assert visit.faults() == []
    before = len(tries(visit.service, job))
    sent.get_by_role("button", name=f"Send job.cancelled of {job} again").press("Enter")
    wait_until(lambda: len(tries(visit.service, job)) > before, 60)
    expect(sent).to_contain_text(re.compile(r"[2-9], last: HTTP 418"))
    page.get_by_label("State").select_option("failed")
    expect(page.get_by_role("heading", name="No such webhooks")).to_be_visible()
    page.get_by_label("State").select_option("pending")
    expect(sent).to_be_visible()


def test_the_secret_of_webhooks_is_shown_on_demand_and_replaced(visit: Visit) -> None:
    page = visit.page
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    visit.open("/admin/webhooks")
    secret = call(visit.service, "/v1/webhook-secret", method="GET")["secret"]
    expect(page.get_by_text("whsec_•")).to_be_visible()
    assert not [url for url in asked if "webhook-secret" in url]
    page.get_by_role("button", name="Show", exact=True).press("Enter")
    expect(page.get_by_text(secret)).to_be_visible()
    assert visit.faults() == []
    page.get_by_role("button", name="Hide").click()
    expect(page.get_by_text(secret)).to_have_count(0)
    page.get_by_role("button", name="Replace").click()
    page.get_by_role("dialog").get_by_role("button", name="Replace").click()
    shown = page.get_by_label("The secret of webhooks")
    expect(shown).to_be_visible()
    fresh = call(visit.service, "/v1/webhook-secret", method="GET")["secret"]
    assert shown.inner_text() == fresh != secret


def test_storage_is_looked_at_before_anything_is_removed(visit: Visit) -> None:
    folder = Path(visit.service.environment["NIBBLE_STATE_DIR"]) / "storage" / "checkpoints"
    lost = folder / "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
    page = visit.open("/admin/storage")
    expect(page.get_by_role("region", name="The tenant default")).to_contain_text("0 artifacts")
    page.get_by_role("button", name="Find what can go").press("Enter")
    expect(page.get_by_text("Nothing to remove")).to_be_visible()
    lost.mkdir(parents=True)
    (lost / "layer-0").write_bytes(b"x" * 2000)
    page.get_by_role("button", name="Find what can go").click()
    expect(page.get_by_text("Can go: 1 checkpoint, 2.0 kB")).to_be_visible()
    page.get_by_text("Checkpoints of jobs that no longer need them (1)").click()
    expect(page.get_by_text(f"checkpoints/{lost.name}")).to_be_visible()
    assert visit.faults() == []
    assert lost.exists()
    page.get_by_role("button", name="Remove them").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove them").click()
    expect(page.get_by_text("Removed: 1 checkpoint.")).to_be_visible()
    assert not (lost / "layer-0").exists()


def test_settings_are_read_searched_and_without_secrets(visit: Visit) -> None:
    page = visit.open("/admin/settings")
    headers = row(page, "NIBBLE_OTLP_HEADERS")
    expect(headers).to_contain_text("***")
    expect(headers).to_contain_text("set")
    assert "word-of-the-collector" not in page.content()
    assert api_key(visit.service) not in page.content()
    expect(row(page, "NIBBLE_MAX_ATTEMPTS")).to_contain_text("default")
    page.get_by_role("searchbox").fill("port")
    expect(row(page, "NIBBLE_MAX_ATTEMPTS")).to_have_count(0)
    page.get_by_label("Only what is set").check()
    expect(page.get_by_role("rowheader")).to_have_text(["NIBBLE_PORT"])
    assert visit.faults() == []


def test_each_page_in_every_look(browser: Browser, service: Service) -> None:
    for look in LOOKS:
        visit = Visit(browser, service, **look)
        visit.open("/admin/keys")
        for area, name in AREAS.items():
            links = visit.page.get_by_role("navigation", name="Administration")
            links.get_by_role("link", name=name).press("Enter")
            expect(visit.page.get_by_role("heading", level=1)).to_have_text(name)
            expect(visit.page.locator(".loading")).to_have_count(0)
            assert links.locator("[aria-current=page]").all_text_contents() == [name]
            assert look is WIDE or visit.faults() == [], (area, look)
            assert visit.page.evaluate(OVERFLOW) <= 0, (area, look)
        visit.page.close()
        assert visit.complaints == []


@pytest.mark.parametrize("scopes", [(Scope.JOBS_READ,), (Scope.ADMIN,)], ids=["reader", "admin of a tenant"])
def test_nobody_sees_what_the_service_would_refuse(
    browser: Browser, service: Service, scopes: tuple[Scope, ...]
) -> None:
    page = signed_in(browser, service, *scopes, tenant="team")
    refused: list[str] = []
    page.on("response", lambda answer: refused.append(answer.url) if answer.status == 403 else None)
    is_admin = Scope.ADMIN in scopes
    sections = page.get_by_role("navigation", name="Sections").get_by_role("link")
    assert ("Administration" in sections.all_text_contents()) is is_admin
    for area, name in AREAS.items():
        page.goto(f"{service.url}/#/admin/{area}")
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        expect(page.locator(".loading")).to_have_count(0)
        lacks = page.get_by_text("This key lacks the scope")
        expect(lacks).to_have_count(0 if is_admin and area != "settings" else 1)
        for button in ("Change limits", "Find what can go", *(() if is_admin else ("New key", "Replace"))):
            expect(page.get_by_role("button", name=button)).to_have_count(0)
    links = page.get_by_role("navigation", name="Administration").get_by_role("link")
    assert links.all_text_contents() == (
        [name for area, name in AREAS.items() if area != "settings"] if is_admin else []
    )
    assert refused == []
    page.close()


def test_an_operator_that_is_no_admin_sees_the_settings(browser: Browser, service: Service) -> None:
    page = signed_in(browser, service, Scope.OPERATOR)
    page.get_by_role("navigation", name="Sections").get_by_role("link", name="Administration").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Settings")
    expect(row(page, "NIBBLE_PROBE_PORT")).to_be_visible()
    links = page.get_by_role("navigation", name="Administration").get_by_role("link")
    assert links.all_text_contents() == ["Settings"]
    page.close()


def test_new_changes_come_to_the_log_by_themselves(visit: Visit) -> None:
    page = visit.page
    page.clock.install()
    visit.open("/admin/audit")
    entries = page.locator("details.entry")
    expect(entries.first).to_be_visible()
    call(visit.service, "/v1/tenants/newest/limits", {}, method="PUT")
    page.clock.run_for(40_000)
    expect(entries.first).to_contain_text("/v1/tenants/newest/limits")


def test_the_page_of_the_api_is_served_without_other_hosts(visit: Visit) -> None:
    page, service = visit.page, visit.service
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    visit.open("/jobs")
    page.get_by_text("Account").click()
    page.get_by_role("link", name="API description").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("API")
    document = call(service, "/openapi.json", method="GET")
    routes = [(method.upper(), path) for path, each in document["paths"].items() for method in each]
    expect(page.locator(".operation")).to_have_count(len(routes))
    page.get_by_role("searchbox").fill("put limits")
    route = page.locator(".operation")
    expect(route).to_have_count(1)
    route.locator("summary").first.press("Enter")
    curl = page.get_by_label("curl for PUT /v1/tenants/{tenant}/limits")
    expect(curl).to_contain_text("curl -X PUT")
    expect(curl).to_contain_text(f"{service.url}/v1/tenants/TENANT/limits")
    for text in ("tenant", "active_jobs", "0 to 10000000", "requests_per_minute"):
        expect(route).to_contain_text(text)
    assert visit.faults() == []
    page.get_by_role("searchbox").fill("")
    page.goto(f"{service.url}/docs#submit_job")
    job = page.locator("#submit_job")
    expect(job.locator("summary").first).to_be_focused()
    recipe = job.locator("details.schema").filter(has_text="Recipe").first
    recipe.locator("summary").press("Enter")
    expect(recipe).to_contain_text("group_size")
    expect(job).to_contain_text("Refusals: 400 Bad Request")
    assert hosts == {service.url.removeprefix("http://")}


# Opens one route in so many.
OPEN = """step => document.querySelectorAll('.operation').forEach((each, at) => {
  each.open = at % step === 0;
})"""


def test_the_page_of_the_api_in_every_look(browser: Browser, service: Service) -> None:
    for look in LOOKS:
        visit = Visit(browser, service, **look)
        visit.page.goto(f"{service.url}/docs")
        expect(visit.page.locator(".operation").first).to_be_visible()
        visit.page.evaluate(OPEN, 10)
        expect(visit.page.locator(".operation-body").last).to_be_visible()
        assert look is WIDE or visit.faults() == [], look
        visit.page.evaluate(OPEN, 1)
        expect(visit.page.locator(".operation-body")).to_have_count(visit.page.locator(".operation").count())
        assert visit.page.evaluate(OVERFLOW) <= 0, look
        visit.page.close()
        assert visit.complaints == []
