"""The dashboard in a real Chromium: from the form to report and artifact, without a fault on the way."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Response, expect

from app.core.records.specs import JobSpec
from tests.e2e.dashboard_visit import (
    PATIENCE_MS,
    Visit,
    api_key,
    call,
    job_store,
    login_path,
    needs_chromium,
)
from tests.e2e.history import ended, fill, record
from tests.e2e.installed import Service

PAGE_WEIGHT_LIMIT = 300_000
POLL_LIMIT = 20_000

pytestmark = needs_chromium


@pytest.mark.timeout(480)
def test_from_the_form_to_the_chat(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(example_model.as_uri())
    page.get_by_text("Nearly lossless").click()
    page.get_by_text("Customize, or compare").click()
    page.get_by_label("KV cache").select_option("fp8")
    page.get_by_text("Target, text, limits").click()
    page.get_by_label("Calibration windows").fill("4")
    page.get_by_label("Tokens per window").fill("64")
    page.get_by_label("Labels").fill("team=search")
    expect(page.get_by_text("bits per weight")).to_be_visible()
    assert visit.faults() == []
    page.get_by_role("button", name="Submit job").click()
    expect(page.locator(".state-succeeded")).to_be_visible(timeout=120_000)
    expect(page.get_by_role("heading", name="Report")).to_be_visible()
    job = page.url.partition("#")[2]
    result = page.get_by_role("region", name="Result")
    expect(result).to_contain_text("smaller")
    expect(result.get_by_role("button", name="Deploy")).to_be_visible()
    candidates = page.get_by_role("region", name="Candidates")
    expect(candidates).to_contain_text("rtn w8 g128 kv fp8")
    expect(candidates).to_contain_text("fp8, keys 0.0")
    expect(page.locator(".uplot").first).to_be_visible()
    expect(page.locator("figcaption", has_text="lines at the clip bounds")).to_be_visible()
    expect(page.get_by_role("table", name="Artifacts").get_by_role("button", name="Deploy")).to_be_visible()
    assert visit.faults() == []
    page.get_by_role("region", name="Artifacts").locator("a[href^='#/artifacts/art_']").click()
    expect(page.get_by_role("link", name="model.safetensors")).to_be_visible()
    assert visit.faults() == []
    give_a_tag(visit)
    with page.expect_download() as download:
        page.get_by_role("link", name="config.json", exact=True).click()
    assert "quantization_config" in json.loads(Path(download.value.path()).read_text())
    deploy_and_chat(visit)
    # The job's result now has the speed, and its first action is the chat.
    visit.open(job)
    expect(result).to_contain_text("tokens/s")
    expect(result.get_by_role("link", name="Chat")).to_be_visible()
    expect(result.get_by_role("button", name="Deploy")).to_have_count(0)
    assert visit.faults() == []


def give_a_tag(visit: Visit) -> None:
    """On an artifact's page; the registry shows it, and a push without a token is refused in the dialog."""
    page = visit.page
    page.get_by_label("New tag").fill("not a tag")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("alert")).to_contain_text("is not a tag")
    page.get_by_label("New tag").fill("production")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("button", name="Remove the tag production")).to_be_visible()
    page.get_by_role("button", name="Push").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Repository").fill("org/name")
    assert visit.faults() == []
    dialog.get_by_role("button", name="Push").click()
    expect(dialog.get_by_role("alert")).to_contain_text("hub token")
    dialog.get_by_role("button", name="Cancel").click()
    page.get_by_role("link", name="Registry").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Registry")
    expect(page.get_by_role("table").first).to_contain_text("production")
    assert visit.faults() == []
    page.go_back()


def deploy_and_chat(visit: Visit) -> None:
    """From an artifact's page to an answer."""
    page = visit.page
    page.get_by_role("button", name="Deploy").click()
    page.get_by_label("Model name").fill("from-the-page")
    page.get_by_role("dialog").get_by_role("button", name="Deploy").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("from-the-page")
    page.get_by_role("link", name="Chat").click(timeout=120_000)
    page.get_by_text("Parameters").click()
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Message").fill("The river")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message-assistant")).to_contain_text("8 tokens")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".message-assistant p")).not_to_have_text("…")
    assert visit.faults() == []
    page.get_by_role("link", name="Deployment", exact=True).click()
    load = page.get_by_role("region", name="Load")
    expect(load).to_contain_text("1, with 8 tokens")
    expect(load.locator("figure")).to_have_count(4)
    assert visit.faults() == []


# Goes back and gives the place at which a list of `count` rows appears, before it is painted.
PLACE_ONCE_BACK = """count => new Promise((resolve) => {
  const isBack = () => document.querySelectorAll("li[data-job]").length === count;
  const changes = new MutationObserver(() => isBack() && resolve(scrollY));
  changes.observe(document, { childList: true, subtree: true });
  history.back();
})"""


def test_a_long_list_is_read_while_it_is_scrolled(visit: Visit) -> None:
    with job_store(visit.service) as store:
        fill(store, 60)
    page = visit.open("/jobs")
    page.reload()  # sooner than the next poll of a list that rests
    rows = page.locator("li[data-job]")
    expect(rows.nth(24)).to_be_attached()
    made = [job["id"] for job in call(visit.service, "/v1/jobs?limit=100", method="GET")["data"]]
    assert len(made) >= 60
    while rows.count() < len(made):
        page.mouse.wheel(0, 2000)
        page.wait_for_timeout(20)
    assert rows.evaluate_all("rows => rows.map((row) => row.dataset.job)") == made
    assert visit.faults() == []
    link = rows.nth(50).get_by_role("link")
    link.focus()
    for _ in range(2):  # the tick of the next row, then its link
        page.keyboard.press("Tab")
    expect(rows.nth(51).get_by_role("link")).to_be_focused()
    # Back from a job, the list is where it was left.
    place = page.evaluate("scrollY")
    assert place > 0
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("awq")
    assert abs(page.evaluate(PLACE_ONCE_BACK, len(made)) - place) < 200
    page.get_by_role("radio", name="failed").check()
    failed = call(visit.service, "/v1/jobs?state=failed&limit=100", method="GET")["data"]
    assert len(failed) >= len([index for index in range(60) if index % 9 == 0])
    expect(rows).to_have_count(len(failed))


HIDE = """isHidden => {
  Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_hidden_tab_asks_nothing(visit: Visit) -> None:
    page = visit.page
    page.clock.install()
    visit.open("/workers")
    expect(page.get_by_role("heading", level=1)).to_have_text("Workers")
    expect(page.locator(".loading")).to_have_count(0)
    asked: list[str] = []
    page.evaluate(HIDE, True)
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(120_000)
    assert asked == []
    with page.expect_request("**/v1/workers"):
        page.evaluate(HIDE, False)


def test_refusals_stand_beside_their_fields(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(example_model.as_uri())
    page.get_by_text("Target, text, limits").click()
    page.get_by_label("Tokens per window").fill("few")
    field = page.locator(".field-bad")
    expect(field).to_contain_text("Tokens per window")
    expect(field).to_contain_text("whole number")
    page.get_by_label("Tokens per window").fill("64")
    expect(field).to_have_count(0)


def test_a_template_keeps_what_has_no_field(visit: Visit, example_model: Path) -> None:
    recipes = [{"method": "rtn", "ignore": ["lm_head", "re:.*down_proj$"]}, {"method": "rtn", "bits": 8}]
    calibration = {"texts": ["A river. " * 40], "num_samples": 2, "sequence_length": 32}
    spec = JobSpec.model_validate(
        {"model": example_model.as_uri(), "recipe": recipes, "calibration": calibration, "timeout_s": 600}
    )
    with job_store(visit.service) as store:
        job = record(store, spec, datetime.now(UTC), ended(1))
    with visit.page.expect_request(
        lambda request: "/v1/estimates" in request.url and request.post_data_json["timeout_s"] == 600
    ) as sent:
        page = visit.open(f"/jobs/new/{job}")
    body = sent.value.post_data_json
    assert [each["method"] for each in body["recipe"]] == ["rtn", "rtn"]
    assert body["recipe"][0]["ignore"] == recipes[0]["ignore"]
    assert (body["calibration"]["texts"], body["calibration"]["dataset"]) == (calibration["texts"], None)
    expect(page.get_by_text("2 recipes")).to_be_visible()


def test_a_job_without_an_evaluation_from_form_to_artifact(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(example_model.as_uri())
    page.get_by_label("Compare with the original").uncheck()
    page.get_by_label("Scheme").select_option("fp8")
    expect(page.get_by_text("nothing will be known of the model's quality")).to_be_visible()
    page.get_by_text("Limits, labels").click()
    expect(page.get_by_label("Max perplexity ratio")).to_have_count(0)
    expect(page.get_by_text("bits per weight")).to_be_visible()
    assert visit.faults() == []
    with page.expect_request(
        lambda request: request.method == "POST" and request.url.endswith("/v1/jobs")
    ) as sent:
        page.get_by_role("button", name="Submit job").click()
    body = sent.value.post_data_json
    assert body["evaluation"] is None
    assert body["recipe"]["method"] == "rtn"
    assert not {"calibration", "target"} & set(body)
    expect(page.locator(".state-succeeded")).to_be_visible(timeout=120_000)
    candidates = page.get_by_role("region", name="Candidates, which were not evaluated")
    expect(candidates).to_contain_text("rtn fp8")
    expect(candidates).to_contain_text("%")
    expect(candidates).not_to_contain_text("Perplexity")
    expect(page.get_by_role("region", name="The linears that rounding moved the most")).to_be_visible()
    expect(page.locator("figure")).to_have_count(0)
    report = page.locator("main").inner_text()
    assert not {"NaN", "undefined", "null", "Infinity"} & set(report.replace(",", " ").split())
    assert visit.faults() == []
    page.get_by_role("region", name="Artifacts").locator("a[href^='#/artifacts/art_']").click()
    expect(page.get_by_role("link", name="model.safetensors")).to_be_visible()
    expect(page.get_by_text("KL per token")).to_have_count(0)
    assert visit.faults() == []
    page.goto(page.url.split("#")[0] + "#/artifacts")
    expect(page.get_by_role("row", name="rtn fp8")).to_contain_text("–")


def test_every_section_is_usable_in_both_themes_and_on_a_phone(browser: Browser, service: Service) -> None:
    for options in (
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 360, "height": 700}},
    ):
        visit = Visit(browser, service, **options)
        for section in ("Jobs", "Artifacts", "Registry", "Deployments", "Workers"):
            visit.page.get_by_role("navigation").get_by_role("link", name=section).click()
            expect(visit.page.get_by_role("heading", level=1)).to_have_text(section)
            expect(visit.page.locator(".loading")).to_have_count(0)
            if section == "Workers":
                expect(visit.page.get_by_role("table")).to_contain_text("Memory in use")
            assert visit.faults() == []
            overflow = visit.page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, f"{section} is wider than the screen"
        visit.page.close()
        assert visit.complaints == []


def test_pages_are_light_and_polls_cost_little(browser: Browser, service: Service) -> None:
    with job_store(service) as store:
        fill(store, 3)
    page = browser.new_page()
    sizes: dict[str, int] = {}
    page.on("response", lambda answer: sizes.update({answer.url: body_size(answer)}))
    page.goto(service.url + login_path(service))
    expect(page.get_by_role("list", name="Jobs, newest first")).to_be_visible()
    assert len(sizes) > 10
    assert sum(sizes.values()) < PAGE_WEIGHT_LIMIT
    polls = [size for url, size in sizes.items() if "/v1/jobs?" in url]
    assert 0 < max(polls) < POLL_LIMIT
    # Once nothing changes, nothing is sent again. Who comes back to the page asks at once.
    page.evaluate(HIDE, True)
    with page.expect_response(
        lambda answer: "/v1/jobs?" in answer.url and answer.status == 304, timeout=PATIENCE_MS
    ):
        page.evaluate(HIDE, False)
    page.close()


def body_size(answer: Response) -> int:
    return int(answer.headers.get("content-length", 0))


def test_a_service_that_is_away_is_said_so(visit: Visit) -> None:
    page = visit.page
    page.clock.install()
    workers = visit.open("/workers").get_by_role("table")
    expect(workers).to_contain_text("Memory in use")
    page.context.set_offline(True)
    page.clock.run_for(60_000)
    away = page.get_by_text("The service has not answered since")
    expect(away).to_be_visible()
    expect(workers).to_contain_text("Memory in use")
    page.context.set_offline(False)
    page.clock.run_for(120_000)
    expect(away).to_have_count(0)
    visit.forgive_network()


def test_without_a_session_a_key_opens_one(browser: Browser, service: Service) -> None:
    page = browser.new_page()
    page.goto(service.url)
    page.get_by_label("API key").fill("nib_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("key")
    page.get_by_label("API key").fill(api_key(service))
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    cookies = page.context.cookies()
    assert [(cookie["httpOnly"], cookie["sameSite"]) for cookie in cookies] == [(True, "Strict")]
    page.close()
