"""The dashboard's chat in Chromium, and what it says when no answer comes. The faults are stand-ins."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Page, Route, expect

from tests.e2e.dashboard_visit import Visit, needs_chromium

pytestmark = needs_chromium

MODEL = {"id": "small", "sampling": {"parameters": {"temperature": 0.7}, "source": "default"}}
REFUSAL = {
    "error": {
        "message": "small is being loaded (try again in a moment)", "type": "service_unavailable_error",
        "param": None, "code": "model_loading",
    }
}  # fmt: skip


def chunk(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"


def events(*texts: str) -> str:
    return "".join(chunk(text) for text in texts) + "data: [DONE]\n\n"


@pytest.fixture
def chat(visit: Visit) -> Page:
    """The chat with a model whose answers the test gives."""
    visit.page.route("**/v1/models/small", lambda route: route.fulfill(json=MODEL))
    page = visit.open("/deployments/small/chat")
    expect(page.get_by_text("Parameters: max_tokens 128, temperature 0.7")).to_be_visible()
    return page


def answer(page: Page, *answers: object) -> list[dict[str, object]]:
    """Give these answers to the chat's requests, in turn; the bodies that were sent."""
    left, sent = list(answers), []

    def reply(route: Route) -> None:
        sent.append(route.request.post_data_json)
        given = left.pop(0)
        if isinstance(given, str):
            route.fulfill(body=given, content_type="text/event-stream")
        else:
            route.fulfill(status=503, json=given)

    page.route("**/v1/chat/completions", reply)
    return sent


def ask(page: Page, text: str) -> None:
    page.keyboard.type(text)  # the field has the focus
    page.keyboard.press("Enter")


def test_a_fault_is_read_and_seen_and_the_question_asked_again(visit: Visit, chat: Page) -> None:
    sent = answer(chat, *[events(f"Answer {n}. " * 30) for n in range(6)], REFUSAL, events("At ", "last."))
    expect(chat.get_by_label("Message")).to_be_focused()
    for number in range(6):
        ask(chat, f"Question {number}")
        expect(chat.get_by_role("button", name="Send")).to_be_visible()
        expect(chat.locator(".message-assistant")).to_have_count(number + 1)
    ask(chat, "And now?")
    problem = chat.get_by_role("alert")
    expect(problem).to_contain_text("small is being loaded")
    expect(problem).to_contain_text("model_loading")
    # Not behind the field: what lies at its middle is the box itself.
    box = problem.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    assert chat.evaluate("([x, y]) => Boolean(document.elementFromPoint(x, y)?.closest('.problem'))", [x, y])
    expect(chat.locator(".message-assistant")).to_have_count(6)  # no empty one
    assert visit.faults() == []
    chat.get_by_role("button", name="Try again").click()
    expect(chat.locator(".message-assistant").last).to_contain_text("At last.")
    expect(problem).to_have_count(0)
    assert sent[-1] == sent[-2]
    visit.complaints = [text for text in visit.complaints if "status of 503" not in text]


def test_an_error_in_the_stream_keeps_what_came_before(chat: Page) -> None:
    broken = chunk("Half of ") + f"data: {json.dumps({'error': {'message': 'it broke', 'code': 'x'}})}\n\n"
    answer(chat, broken)
    ask(chat, "Tell me")
    expect(chat.get_by_role("alert")).to_contain_text("it broke")
    expect(chat.locator(".message-assistant")).to_contain_text("Half of")


def test_a_chat_is_there_again(chat: Page) -> None:
    answer(chat, events("Hello."))
    ask(chat, "Hi")
    expect(chat.locator(".message-assistant")).to_contain_text("Hello.")
    chat.get_by_role("link", name="Jobs").click()
    expect(chat.get_by_role("heading", name="Jobs")).to_be_visible()
    chat.go_back()
    expect(chat.locator(".message-assistant")).to_contain_text("Hello.")
    chat.get_by_role("button", name="New chat").click()
    expect(chat.locator(".message")).to_have_count(0)
    chat.reload()
    expect(chat.get_by_label("Message")).to_be_focused()
    expect(chat.locator(".message")).to_have_count(0)


def test_an_unknown_deployment_has_no_playground(visit: Visit) -> None:
    page = visit.open("/deployments/NOSUCH/chat")
    expect(page.get_by_text("There is no such deployment")).to_be_visible()
    expect(page.get_by_label("Message")).to_have_count(0)
    assert visit.faults() == []
