"""A job's answers beside its original's in Chromium: a real job, real servers of both, and their faults."""

from __future__ import annotations

import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from app.core.access.api_keys import Scope
from tests.e2e.dashboard_visit import Visit, call, needs_chromium, visit_with
from tests.e2e.installed import Service
from tests.waiting import wait_until

pytestmark = [needs_chromium, pytest.mark.timeout(480)]

PROMPTS = ["The river ran", "My lord, I pray you", "", "", ""]
IDS = ("original", "quantized")


@pytest.fixture(scope="module")
def job(service: Service, example_model: Path) -> str:
    """A finished job whose model is so coarse that it says something else than its original."""
    body = {
        "model": example_model.as_uri(),
        "recipe": {"method": "rtn", "bits": 2, "group_size": 32},
        "calibration": {"num_samples": 2, "sequence_length": 64},
        "evaluation": {"num_samples": 2},
        "formats": ["compressed-tensors"],
    }
    job = call(service, "/v1/jobs", body)["id"]

    def state() -> str:
        return str(call(service, f"/v1/jobs/{job}", method="GET")["state"])

    wait_until(lambda: state() == "succeeded", 240, failure=lambda: state() in ("failed", "cancelled"))
    return str(job)


def section(page: Page) -> Locator:
    return page.locator("details", has=page.get_by_text("Answers beside the original"))


def opened(visit: Visit, job: str) -> Locator:
    """The section, opened by the keyboard."""
    page = visit.open(f"/jobs/{job}")
    summary = section(page).locator("summary")
    summary.focus()
    page.keyboard.press("Enter")
    expect(section(page).get_by_label("Prompt 1", exact=True)).to_be_visible()
    return section(page)


def fill(part: Locator, prompts: list[str] = PROMPTS) -> None:
    for number, prompt in enumerate(prompts, 1):
        part.get_by_label(f"Prompt {number}", exact=True).fill(prompt)


def deployments(service: Service) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = call(service, "/v1/deployments", method="GET")["data"]
    return data


def said(service: Service, name: str, prompt: str) -> str:
    """What the deployment answers to any client."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 96}
    return str(call(service, "/v1/chat/completions", body)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def served(browser: Browser, service: Service, job: str) -> dict[str, str]:
    """The names of both deployments, which the first visit has started."""
    visit = Visit(browser, service)
    part = opened(visit, job)
    fill(part)
    expect(part).to_contain_text("Original: not served")
    visit.page.keyboard.press("Tab")
    start = part.get_by_role("button", name="Serve both and compare")
    start.focus()
    visit.page.keyboard.press("Enter")
    expect(part.get_by_role("progressbar").first).to_be_visible()
    second = part.get_by_role("group", name="Answers to prompt 2")
    expect(second).to_contain_text("differ from word", timeout=240_000)
    by_side = {("original" if each["original"] else "quantized"): each for each in deployments(service)}
    assert set(by_side) == set(IDS)
    assert {each["idle_timeout_s"] for each in by_side.values()} == {600}
    names = {side: str(each["name"]) for side, each in by_side.items()}
    assert names["original"].startswith("wikitext-llama-6m-original-")
    for number, prompt in enumerate(PROMPTS[:2], 1):
        check_pair(part.get_by_role("group", name=f"Answers to prompt {number}"), service, names, prompt)
    expect(part.get_by_role("group", name="Answers to prompt 3")).to_have_count(0)
    expect(part.get_by_role("button", name="Compare answers")).to_be_visible()
    assert visit.faults() == []
    visit.page.close()
    assert visit.complaints == []
    return names


def check_pair(pair: Locator, service: Service, names: dict[str, str], prompt: str) -> None:
    """Both answers are those of the deployments, with their pace, and their first difference is marked."""
    answers = [said(service, names[side], prompt) for side in IDS]
    words = [answer.split() for answer in answers]
    steps = enumerate(zip_longest(*words))
    at, first = next((index, two) for index, two in steps if two[0] != two[1])
    for index in range(2):
        message = pair.locator(".message").nth(index)
        expect(message).to_contain_text("per second")
        expect(message.locator("mark")).to_have_text(first[index] or "(ends here)")
        shown = (message.locator("p").text_content() or "").removesuffix("(ends here)")
        assert shown.split() == words[index]
    expect(pair).to_contain_text(f"differ from word {at + 1} on")


def test_both_are_served_waited_for_and_compared(served: dict[str, str]) -> None:
    """The fixture has looked at each step."""
    assert set(served) == set(IDS)


def test_prompts_stay_in_the_browser(visit: Visit, job: str, served: dict[str, str]) -> None:
    part = opened(visit, job)
    part.get_by_label("Prompt 1", exact=True).fill("Only mine")
    visit.page.reload()
    part = opened(visit, job)
    expect(part.get_by_label("Prompt 1", exact=True)).to_have_value("Only mine")
    part.get_by_role("button", name="Reset prompts").click()
    expect(part.get_by_label("Prompt 1", exact=True)).to_have_value(
        "Explain in two sentences why the sky is blue."
    )


def test_without_room_in_the_browser_prompts_are_changed_all_the_same(
    visit: Visit, job: str, served: dict[str, str]
) -> None:
    visit.page.add_init_script("Storage.prototype.setItem = () => { throw new Error('no room'); };")
    visit.page.reload()
    part = opened(visit, job)
    part.get_by_label("Prompt 1", exact=True).fill("Only mine")
    part.get_by_label("Prompt 2", exact=True).fill("Mine too")
    expect(part.get_by_label("Prompt 1", exact=True)).to_have_value("Only mine")
    visit.page.get_by_text("Account").click()
    theme = visit.page.get_by_role("button", name=re.compile("(Dark|Light) theme"))
    before = theme.inner_text()
    theme.click()
    expect(theme).not_to_have_text(before)


def test_a_fault_stands_where_the_answer_would(visit: Visit, job: str, served: dict[str, str]) -> None:
    refusal = {"error": {"message": "the prompt is too long", "type": "x", "code": "context_length_exceeded"}}

    def refuse_original(route: Route) -> None:
        if route.request.post_data_json["model"] == served["original"]:
            route.fulfill(status=400, json=refusal)
        else:
            route.continue_()

    visit.page.route("**/v1/chat/completions", refuse_original)
    part = opened(visit, job)
    fill(part)
    part.get_by_role("button", name="Compare answers").click()
    pair = part.get_by_role("group", name="Answers to prompt 2")
    expect(pair.get_by_role("alert")).to_contain_text("the prompt is too long")
    expect(pair.locator(".message").nth(1)).to_contain_text("per second")
    expect(pair.locator("mark")).to_have_count(0)
    assert visit.faults() == []


def test_it_can_be_stopped(visit: Visit, job: str, served: dict[str, str]) -> None:
    held: list[Route] = []
    visit.page.route("**/v1/chat/completions", lambda route: held.append(route))  # no answer comes
    part = opened(visit, job)
    fill(part)
    part.get_by_role("button", name="Compare answers").click()
    part.get_by_role("button", name="Stop").click()
    expect(part.get_by_role("button", name="Compare answers")).to_be_visible()
    expect(part.get_by_role("alert")).to_have_count(0)
    expect(part.get_by_role("group", name="Answers to prompt 2")).to_have_count(0)
    assert len(held) == 2


def test_what_has_ended_by_itself_starts_again(visit: Visit, job: str, served: dict[str, str]) -> None:
    original = next(each for each in deployments(visit.service) if each["original"])
    path = f"/v1/deployments/{original['id']}"
    call(visit.service, path, {"idle_timeout_s": 1}, method="PATCH")
    said(visit.service, served["original"], "The river")  # the time counts from this question
    wait_until(lambda: call(visit.service, path, method="GET")["state"] == "stopped", 60)
    call(visit.service, path, {"idle_timeout_s": 600}, method="PATCH")
    part = opened(visit, job)
    fill(part, ["The river ran", "", "", "", ""])
    part.get_by_role("button", name="Compare answers").click()
    pair = part.get_by_role("group", name="Answers to prompt 1")
    expect(pair).to_contain_text("differ from word", timeout=120_000)
    # The request that wakes it is refused: the browser says so.
    visit.complaints = [text for text in visit.complaints if "status of 503" not in text]


def test_on_a_phone_the_answers_stand_below_each_other(
    browser: Browser, service: Service, job: str, served: dict[str, str]
) -> None:
    visit = Visit(browser, service, viewport={"width": 390, "height": 844})
    part = opened(visit, job)
    fill(part, ["The river ran", "", "", "", ""])
    part.get_by_role("button", name="Compare answers").click()
    pair = part.get_by_role("group", name="Answers to prompt 1")
    expect(pair).to_contain_text("differ from word")
    boxes = [pair.locator(".message").nth(index).bounding_box() for index in range(2)]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert visit.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert visit.faults() == []
    visit.page.close()
    assert visit.complaints == []


@pytest.mark.parametrize(
    ("more", "text"), [([Scope.INFERENCE], "Your key may not start what is missing"), ([], None)]
)
def test_a_key_sees_what_it_may_do(
    browser: Browser, service: Service, job: str, more: list[Scope], text: str | None
) -> None:
    """Nothing is served, as far as this page is told."""
    reading = (Scope.JOBS_READ, Scope.ARTIFACTS_READ, Scope.DEPLOYMENTS_READ)
    page = visit_with(browser, service, *reading, *more)
    nothing = {"object": "list", "data": [], "has_more": False, "next": None}
    page.route("**/v1/deployments?*", lambda route: route.fulfill(json=nothing))
    page.goto(f"{service.url}/#/jobs/{job}")
    expect(page.get_by_role("region", name="Result")).to_contain_text("smaller")
    expect(page.get_by_role("region", name="Artifacts")).to_be_visible()
    if text is None:
        expect(section(page)).to_have_count(0)
    else:
        section(page).locator("summary").click()
        expect(section(page)).to_contain_text(text)
        expect(section(page).get_by_role("button", name="Serve")).to_have_count(0)
    page.close()


def test_nothing_is_asked_for_while_it_is_closed(visit: Visit, job: str) -> None:
    """The result's own poll goes on, at its pace; the section's is there only while it is open."""
    visit.page.clock.install()
    asked: list[str] = []
    visit.page.on("request", lambda request: asked.append(request.url))

    def asked_in_a_minute() -> int:
        asked.clear()
        for _ in range(60):
            visit.page.clock.run_for(1000)
            visit.page.evaluate("fetch('/healthz').then((answer) => answer.text())")
        return sum(url.endswith("/v1/deployments?limit=100") for url in asked)

    page = visit.open(f"/jobs/{job}")
    expect(section(page)).to_be_visible()
    closed = asked_in_a_minute()
    assert closed <= 5
    opened(visit, job)
    assert asked_in_a_minute() >= closed + 3
    section(page).locator("summary").click()
    expect(section(page).get_by_label("Prompt 1", exact=True)).to_have_count(0)
    assert asked_in_a_minute() <= 5


def test_a_long_choice_stays_in_its_card_on_a_phone(browser: Browser, service: Service, job: str) -> None:
    visit = Visit(browser, service, viewport={"width": 320, "height": 700})
    (artifact,) = call(service, f"/v1/jobs/{job}", method="GET")["artifacts"]
    one = call(service, f"/v1/artifacts/{artifact}", method="GET")
    label = "awq+gptq w4 g128 kv fp8, and more"
    other = {**one, "id": artifact[:-1] + "Z", "summary": {**one["summary"], "label": label}}
    visit.page.route(f"**/v1/artifacts/{other['id']}", lambda route: route.fulfill(json=other))

    def with_both(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(json={**answer.json(), "artifacts": [artifact, other["id"]]})

    visit.page.route(f"**/v1/jobs/{job}", with_both)
    part = opened(visit, job)
    choice = part.get_by_label("Quantized model")
    choice.select_option(other["id"])
    card, box = part.bounding_box(), choice.bounding_box()
    assert card is not None
    assert box is not None
    assert box["x"] + box["width"] < card["x"] + card["width"]
    assert visit.faults() == []
    visit.page.close()
    assert visit.complaints == []


def test_an_answer_that_comes_in_one_burst_has_the_pace_of_the_whole(
    visit: Visit, job: str, served: dict[str, str]
) -> None:
    """The browser may read all events at once: they did not come within a millisecond."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": f"word{number} "}}]} for number in range(40)]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    events = {"body": body, "content_type": "text/event-stream"}
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(**events))
    part = opened(visit, job)
    fill(part, ["Now", "", "", "", ""])
    part.get_by_role("button", name="Compare answers").click()
    pace = (
        part.get_by_role("group", name="Answers to prompt 1").locator(".message").first.locator("small").last
    )
    expect(pace).to_contain_text(re.compile(r"^40 tokens, [\d.]+ per second, first after \d+ ms$"))
    rate, first_ms = re.findall(r"[\d.]+", pace.inner_text())[1:]
    assert float(rate) * (float(first_ms) - 1) / 1000 <= 39
