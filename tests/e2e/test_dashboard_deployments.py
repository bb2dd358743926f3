"""The pages of deployments in Chromium: what may be set and changed, and the load over time.

Two servers of the bundled model are real; the records of states that are hard to have are stand-ins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Response, Route, expect

from app.core.access.api_keys import Scope
from tests.e2e.dashboard_visit import Visit, call, needs_chromium, visit_with
from tests.e2e.installed import Service
from tests.waiting import wait_until

pytestmark = needs_chromium

OTHER = "art_01ARZ3NDEKTSV4RRFFQ69G5FAV"
POLL_LIMIT = 20_000
SMALL: dict[str, Any] = {
    "object": "deployment", "id": "dep_1", "name": "small", "artifact": "art_00000000000000000000000000",
    "engine": "auto", "state": "ready", "reason": "", "error": None, "idle_timeout_s": None, "aliases": [],
    "dtype": None, "max_model_len": None, "max_num_seqs": 8, "cache_share": None, "vllm": None,
    "replicas": 1, "revision": 7, "generation": 1, "replacement": None, "servers": [], "job": None,
    "created_at": "2026-11-28T10:00:00Z", "links": {},
}  # fmt: skip


def opened(visit: Visit, path: str = "/deployments", **fields: object) -> tuple[Page, list[Any]]:
    """The page with one such deployment; If-Match and body of each change that was sent."""
    sent: list[tuple[str | None, Any]] = []

    def reply(route: Route) -> None:
        if route.request.method == "PATCH":
            sent.append((route.request.headers.get("if-match"), route.request.post_data_json))
        route.fulfill(json=SMALL | fields)

    visit.page.route("**/v1/deployments/dep_1", reply)
    page_of = {"object": "list", "data": [SMALL | fields], "next": None, "has_more": False}
    for address in ("**/v1/deployments", "**/v1/deployments?limit=100"):
        visit.page.route(address, lambda route: route.fulfill(json=page_of))
    page = visit.open(path)
    expect(page.get_by_role("heading", name="small")).to_be_visible()
    return page, sent


def test_what_differs_is_sent_with_the_revision_that_was_read(visit: Visit) -> None:
    page, sent = opened(visit)
    page.get_by_role("button", name="Change").click()
    dialog = page.get_by_role("dialog", name="Change small")
    dialog.get_by_label("Replicas").fill("3")
    dialog.get_by_label("Artifact").fill(OTHER)
    dialog.get_by_label("Further names").fill("gpt-4o, tiny")
    dialog.get_by_label("Requests at once").fill("")
    dialog.get_by_role("button", name="Apply").click()
    expect(dialog).to_be_hidden()
    aliases = ["gpt-4o", "tiny"]
    assert sent == [('"7"', {"replicas": 3, "artifact": OTHER, "aliases": aliases, "max_num_seqs": None})]
    assert visit.faults() == []


def test_older_deployments_are_listed_too(visit: Visit) -> None:
    def reply(route: Route) -> None:
        old = "after=dep_1" in route.request.url
        shown = SMALL | ({"id": "dep_0", "name": "old"} if old else {})
        route.fulfill(json={"object": "list", "data": [shown], "next": "dep_1", "has_more": not old})

    visit.page.route("**/v1/deployments**", reply)
    page = visit.open("/deployments")
    expect(page.get_by_role("heading", name="small")).to_be_visible()
    page.get_by_role("button", name="Older deployments").click()
    expect(page.get_by_role("heading", name="old")).to_be_visible()
    expect(page.get_by_role("button", name="Older deployments")).to_have_count(0)
    assert visit.faults() == []


def test_pages_do_without_what_plain_http_lacks(visit: Visit, example_model: Path) -> None:
    """From another host over HTTP a browser gives neither a clipboard nor `crypto.randomUUID`."""
    lacks = "for (const [of, name] of [[crypto, 'randomUUID'], [navigator, 'clipboard']])"
    visit.page.add_init_script(f"{lacks} Object.defineProperty(of, name, {{ value: undefined }});")
    visit.page.route("**/v1/estimates", lambda route: None)  # none comes before the form is sent
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(str(example_model / "absent"))
    page.get_by_role("button", name="Submit job").click()
    expect(page.get_by_text("The job was refused")).to_be_visible()
    page, _ = opened(visit, "/deployments/small")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()


def test_options_without_a_field_stay(visit: Visit) -> None:
    vllm = {"tensor_parallel_size": 2, "tool_call_parser": "hermes"}
    page, sent = opened(visit, engine="vllm", vllm=vllm)
    page.get_by_role("button", name="Change").click()
    dialog = page.get_by_role("dialog", name="Change small")
    expect(dialog.get_by_label("Tensor parallel")).to_have_value("2")
    dialog.get_by_label("Tensor parallel").fill("4")
    dialog.get_by_role("button", name="Apply").click()
    expect(dialog).to_be_hidden()
    assert sent == [('"7"', {"vllm": {"tensor_parallel_size": 4, "tool_call_parser": "hermes"}})]


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


@pytest.mark.parametrize("path", ["/deployments", "/deployments/small"])
@pytest.mark.parametrize(
    ("error", "text"),
    [(None, "Being replaced by"), ({"code": "cache_too_small", "message": "too little memory", "remedy": ""},
      "could not replace it: too little memory. The present one goes on serving.")],
)  # fmt: skip
def test_a_replacement_is_seen(visit: Visit, error: object, text: str, path: str) -> None:
    replacement = {
        "generation": 2,
        "served": {"artifact": OTHER, "engine": "auto"},
        "ready": 0,
        "error": error,
    }
    page, _ = opened(visit, path, replacement=replacement)
    expect(page.get_by_text(text)).to_be_visible()
    expect(page.get_by_role("link", name=OTHER)).to_be_visible()


def test_the_first_request_in_three_languages(visit: Visit) -> None:
    page, _ = opened(visit, "/deployments/small")
    for language, line in (
        ("curl", "curl "),
        ("Python", "from openai import OpenAI"),
        ("JavaScript", "new OpenAI"),
    ):
        page.get_by_role("button", name=language, exact=True).click()
        expect(page.locator("pre")).to_contain_text(line)
        expect(page.locator("pre")).to_contain_text("small")


def test_an_unknown_deployment_has_no_page(visit: Visit) -> None:
    page = visit.open("/deployments/NOSUCH")
    expect(page.get_by_text("There is no such deployment")).to_be_visible()
    assert visit.faults() == []


@pytest.fixture(scope="module")
def artifact(service: Service, example_model: Path) -> str:
    """Of a short job on the bundled model, without an evaluation."""
    body = {"model": example_model.as_uri(), "recipe": {"method": "rtn", "bits": 8}, "evaluation": None}
    job = call(service, "/v1/jobs", body)["id"]

    return str(reached(service, f"/v1/jobs/{job}", "succeeded")["artifacts"][0])


def reached(service: Service, path: str, state: str) -> dict[str, Any]:
    """What is shown at the path, once it is in that state."""
    shown: dict[str, Any] = {}

    def is_there() -> bool:
        shown.update(call(service, path, method="GET"))
        return shown["state"] == state

    wait_until(is_there, 120.0, failure=lambda: shown.get("error"))
    return shown


@pytest.fixture(scope="module")
def deployed(service: Service, artifact: str) -> dict[str, Any]:
    """A deployment whose server answers."""
    made = call(service, "/v1/deployments", {"artifact": artifact, "name": "w8", "aliases": ["copy"]})["id"]

    return reached(service, f"/v1/deployments/{made}", "ready")


def test_options_at_creation(visit: Visit, artifact: str) -> None:
    """By keyboard: what an engine does not read has no field, a refusal stands beside its field."""
    page = visit.open(f"/artifacts/{artifact}")
    page.get_by_role("button", name="Deploy").press("Enter")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Model name").fill("own/options")
    dialog.get_by_text("Options", exact=True).focus()
    page.keyboard.press("Enter")
    engine = dialog.get_by_label("Engine")
    assert [dialog.get_by_label(name).count() for name in ("Cache share", "Tensor parallel")] == [0, 0]
    engine.select_option("vllm")
    dialog.get_by_label("Tensor parallel").fill("2")
    expect(dialog.get_by_label("Cache share")).to_have_count(0)
    dialog.get_by_text("As curl").click()
    original = dialog.get_by_label("Serve the original instead")
    original.check()
    expect(dialog.locator("pre")).to_contain_text('"original": true')
    original.uncheck()
    expect(dialog.locator("pre")).to_contain_text('"tensor_parallel_size": 2')
    assert visit.faults() == []
    dialog.get_by_role("button", name="Deploy").click()
    expect(dialog.get_by_role("alert")).to_contain_text("no worker has vllm installed")
    engine.select_option("transformers")
    expect(dialog.get_by_role("alert")).to_have_count(0)
    expect(dialog.locator("pre")).not_to_contain_text("vllm")
    dialog.get_by_label("Cache share").fill("0.2")
    dialog.get_by_label("Longest request").fill("many")
    dialog.get_by_label("Further names").fill("mine, writer")
    dialog.get_by_label("Idle timeout").fill("3600")
    page.keyboard.press("Enter")
    bad = dialog.locator(".field-bad")
    expect(bad).to_contain_text("Longest request")
    expect(bad).to_contain_text("whole number")
    assert visit.faults() == []
    dialog.get_by_label("Longest request").fill("64")
    with page.expect_request("**/v1/deployments") as sent:
        page.keyboard.press("Enter")
    assert sent.value.post_data_json == {
        "artifact": artifact, "name": "own/options", "engine": "transformers", "cache_share": 0.2,
        "max_model_len": 64, "aliases": ["mine", "writer"], "idle_timeout_s": 3600,
    }  # fmt: skip
    shows_its_options(page)


def shows_its_options(page: Page) -> None:
    """The page of the deployment that was just made; it goes."""
    expect(page.get_by_role("heading", level=1)).to_have_text("own/options")
    facts = page.locator("main")
    expect(facts).to_contain_text("mine, writer")
    expect(facts).to_contain_text("longest request 64 tokens, cache share 0.2")
    expect(facts).to_contain_text("after 60 min 00 s without requests")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Deployments")


HIDE = """isHidden => {
  Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def numbers(page: Page, title: str) -> list[list[str]]:
    """The rows of a chart's table without the times, the newest first."""
    rows = page.get_by_role("region", name=title).locator("tbody tr").all()
    return [row.locator("td").all_inner_texts() for row in rows]


def test_the_load_over_time(visit: Visit, service: Service, deployed: dict[str, Any]) -> None:
    page, sizes = visit.page, []
    page.on("response", lambda answer: sizes.append(size_of(answer)) if "/v1/" in answer.url else None)
    page.clock.install()
    visit.open("/deployments/w8")
    load = page.get_by_role("region", name="Load")
    expect(load.locator(".uplot")).to_have_count(4)
    for figure in load.locator("figure").all():
        figure.get_by_text("Numbers").click()
    body = {"model": "w8", "prompt": "The river", "max_tokens": 20, "ignore_eos": True}
    call(service, "/v1/completions", body)
    with page.expect_response("**/metrics?*"):
        page.clock.run_for(5_000)
    expect(load).to_contain_text("1, with 20 tokens")
    newest, first = numbers(page, "Throughput")
    assert first == ["–"]
    # 20 tokens in at least the five seconds of this page's clock, less the time of the first answer.
    assert 0 < float(newest[0]) < 5
    assert float(numbers(page, "Time to first token, mean")[0][0]) > 0
    assert numbers(page, "Requests")[0] == ["0", "0"]
    assert numbers(page, "Cache in use")[0] == ["0"]
    # While nothing was read there is no line, and what came then is not said to be of the last five seconds.
    page.evaluate(HIDE, True)
    page.clock.run_for(60_000)
    call(service, "/v1/completions", body)
    page.evaluate(HIDE, False)
    with page.expect_response("**/metrics?*"):
        page.clock.run_for(5_000)
    expect(load).to_contain_text("2, with 40 tokens")
    assert numbers(page, "Throughput")[:2] == [["–"], ["–"]]
    assert max(sizes) < POLL_LIMIT
    assert visit.faults() == []
    # Who goes to the list and comes back finds the same points.
    page.get_by_role("link", name="Deployments").click()
    page.get_by_role("link", name="w8", exact=True).click()
    load.locator("figure").first.get_by_text("Numbers").click()
    expect(page.get_by_role("region", name="Throughput").locator("tbody tr").nth(4)).to_be_attached()


def size_of(answer: Response) -> int:
    return int(answer.headers.get("content-length", 0))


@pytest.mark.parametrize("original", [False, True])
def test_what_is_served_with_its_figures(visit: Visit, artifact: str, original: bool) -> None:
    """The figures are the artifact's: of an original none is shown."""
    page, _ = opened(visit, "/deployments/small", artifact=artifact, original=original)
    model = page.get_by_role("region", name="Model")
    expect(model).to_contain_text("wikitext-llama-6m")
    expect(model).to_contain_text("not quantized" if original else "rtn w8 g128, compressed-tensors")
    expect(model.get_by_text("Bits per weight")).to_have_count(0 if original else 1)


def test_two_real_answers_beside_each_other(visit: Visit, deployed: dict[str, Any]) -> None:
    """The same message under both names of the deployment, with the same seed."""
    # The charts of the deployment's page go on here.
    with visit.page.expect_response("**/metrics?*"):
        page = visit.open("/deployments/w8/chat")
    page.get_by_label("Compare with").select_option("copy")
    page.get_by_text("Parameters").click()
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Message").fill("The river")
    page.keyboard.press("Enter")
    answers = page.locator(".message-assistant")
    expect(answers).to_have_count(2)
    for each in answers.all():
        expect(each).to_contain_text("8 tokens")
        expect(each).to_contain_text("first after")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(2)
    first, second = answers.locator("p").all_inner_texts()
    assert first == second
    assert visit.faults() == []


def test_a_servers_metrics_by_name(visit: Visit, deployed: dict[str, Any]) -> None:
    path = f"/v1/deployments/{deployed['id']}/servers/0/metrics?name[]=vllm:num_requests_running"
    lines = visit.page.request.get(visit.service.url + path).text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'vllm:num_requests_running{engine="0",model_name="w8"} 0.0'
    ]


def test_a_key_that_reads_sees_the_page_alone(
    browser: Browser, service: Service, deployed: dict[str, Any]
) -> None:
    page = visit_with(browser, service, Scope.DEPLOYMENTS_READ)
    for path in ("/deployments", "/deployments/w8"):
        page.goto(f"{service.url}/#{path}")
        expect(page.get_by_role("heading", name="w8")).to_be_visible()
        expect(page.get_by_text(deployed["artifact"])).to_be_visible()
        expect(page.get_by_role("link", name="Chat")).to_have_count(0)
        for name in ("Change", "Pause", "Delete"):
            expect(page.get_by_role("button", name=name)).to_have_count(0)
    expect(page.get_by_role("region", name="Load")).to_contain_text("tokens")
    page.goto(f"{service.url}/#/deployments/w8/chat")
    expect(page.get_by_text("No right to chat")).to_be_visible()
    expect(page.get_by_label("Message")).to_have_count(0)
    page.close()


def test_a_key_for_inference_alone_chats(
    browser: Browser, service: Service, deployed: dict[str, Any]
) -> None:
    page = visit_with(browser, service, Scope.INFERENCE)
    refused: list[str] = []
    page.on("response", lambda answer: refused.append(answer.url) if answer.status == 403 else None)
    page.goto(f"{service.url}/#/deployments/w8/chat")
    expect(page.get_by_label("Compare with")).to_be_visible()
    page.get_by_label("Message").fill("The river")
    page.keyboard.press("Enter")
    expect(page.locator(".message-assistant")).to_contain_text("first after")
    expect(page.get_by_role("link", name="Deployment")).to_have_count(0)
    assert refused == []
    page.close()


LOOKS: tuple[dict[str, Any], ...] = (
    {"color_scheme": "light", "viewport": {"width": 2560, "height": 1200}},
    {"color_scheme": "dark"},
    {"color_scheme": "light", "viewport": {"width": 320, "height": 700}},
)


# Leaves the page, and resizes the window as soon as its charts are gone.
LEAVE = """() => new Promise((left) => {
  new MutationObserver((_, seen) => {
    if (document.querySelector(".uplot")) return;
    seen.disconnect();
    dispatchEvent(new Event("resize"));
    left();
  }).observe(document.body, { childList: true, subtree: true });
  location.hash = "#/workers";
})"""


@pytest.mark.usefixtures("deployed")
def test_a_window_that_is_resized_as_its_charts_go(browser: Browser, service: Service) -> None:
    visit = Visit(browser, service)
    page = visit.open("/deployments/w8")
    expect(page.locator(".uplot")).to_have_count(4)
    page.evaluate(LEAVE)
    expect(page.get_by_role("heading", level=1)).to_have_text("Workers")
    page.close()
    assert visit.complaints == []


@pytest.mark.parametrize("look", LOOKS, ids=["light", "dark", "narrow"])
def test_every_page_is_usable_in_each_look(
    browser: Browser, service: Service, deployed: dict[str, Any], look: dict[str, Any]
) -> None:
    visit = Visit(browser, service, **look)
    page = visit.page
    for path in ("/deployments", "/deployments/w8", "/deployments/w8/chat"):
        visit.open(path)
        expect(page.get_by_role("heading", name="w8")).to_be_visible()
        expect(page.locator(".loading")).to_have_count(0)
        if path == "/deployments/w8":
            expect(page.locator(".uplot")).to_have_count(4)
            page.get_by_text("Numbers").first.click()
        if path.endswith("/chat"):
            page.get_by_text("System prompt").first.click()
            page.get_by_text("Parameters").click()
        assert visit.faults() == []
        width = look.get("viewport", {"width": 1280})["width"]
        for each in (320, 390, 480, 740) if width == 320 else (width,):
            page.set_viewport_size({"width": each, "height": 900})
            # Charts are drawn anew once the browser tells of the width.
            wait_until(lambda: page.evaluate("document.documentElement.scrollWidth <= innerWidth"), 20.0)
    visit.open(f"/artifacts/{deployed['artifact']}")
    page.get_by_role("button", name="Deploy").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Options", exact=True).click()
    assert dialog.evaluate("dialog => dialog.scrollWidth - dialog.clientWidth") <= 0
    assert visit.faults() == []
    page.close()
    assert visit.complaints == []
