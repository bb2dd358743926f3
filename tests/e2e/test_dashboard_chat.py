"""The dashboard's chat in Chromium, and what it says when no answer comes. The faults are stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.e2e.dashboard_visit import Visit, needs_chromium

pytestmark = needs_chromium

DEFAULTS = {
    "small": {"parameters": {"temperature": 0.7}, "source": "default"},
    "large": {"parameters": {"temperature": 0.6, "top_k": 20}, "source": "model"},
}
PLACE = "nibble-conversations default"
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
    """The chat with a model whose answers the test gives; there is another one."""

    def describe(route: Route) -> None:
        name = route.request.url.rpartition("/")[2]
        route.fulfill(json={"id": name, "sampling": DEFAULTS[name]})

    visit.page.route("**/v1/models/*", describe)
    listed = {"object": "list", "data": [{"id": name} for name in DEFAULTS]}
    visit.page.route("**/v1/models", lambda route: route.fulfill(json=listed))
    page = visit.open("/deployments/small/chat")
    expect(page.get_by_text("Parameters: max_tokens 128, temperature 0.7")).to_be_visible()
    return page


def answer(page: Page, *answers: object) -> list[dict[str, Any]]:
    """Give these answers to the chat's requests, in turn; the bodies that were sent."""
    left, sent = list(answers), []

    def reply(route: Route) -> None:
        sent.append(route.request.post_data_json)
        given = left.pop(0)
        if isinstance(given, str):
            route.fulfill(body=given, content_type="text/event-stream")
        elif given is not None:  # None: no answer comes
            route.fulfill(status=503, json=given)

    page.route("**/v1/chat/completions", reply)
    return sent


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def asked(page: Page, text: str, answers: int) -> None:
    """Ask, and wait until so many answers are on the page."""
    ask(page, text)
    expect(page.locator(".message-assistant")).to_have_count(answers)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def words(*turns: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(turns)
    ]


def stored(page: Page) -> list[dict[str, Any]]:
    text = page.evaluate("place => localStorage.getItem(place)", PLACE)
    return list(json.loads(text)["conversations"]) if text else []


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


def test_two_models_answer_beside_each_other(visit: Visit, chat: Page) -> None:
    sent = answer(chat, events("First."), events("A."), events("B."), events("C."), REFUSAL, events("D."))
    asked(chat, "One", 1)
    chat.get_by_label("Compare with").select_option("large")
    expect(chat.get_by_text("temperature 0.6, top_k 20 (set by the model)")).to_be_visible()
    asked(chat, "Two", 3)
    assert {body["model"]: body["temperature"] for body in sent[1:]} == {"small": 0.7, "large": 0.6}
    # Which came later reads what the first one had answered.
    assert [body["messages"] for body in sent[1:]] == [words("One", "First.", "Two")] * 2
    left, right = chat.locator(".answers-beside .message").all()
    boxes = [left.bounding_box(), right.bounding_box()]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    expect(left).to_contain_text("small")
    expect(right).to_contain_text("large")
    expect(right).to_contain_text("first after")
    ask(chat, "Three")
    # Each goes on with its own answers; the fault of one stands in its place.
    expect(chat.locator(".answers-beside .answer").last.get_by_role("alert")).to_contain_text("model_loading")
    own = dict(zip([body["model"] for body in sent[1:3]], ("A.", "B."), strict=True))
    for body in sent[3:]:
        assert body["messages"] == words("One", "First.", "Two", own[body["model"]], "Three")
    assert visit.faults() == []
    chat.get_by_role("button", name="Try again").click()
    expect(chat.locator(".answer").last).to_contain_text("D.")
    assert [body["model"] for body in sent[5:]] == ["large"]
    chat.set_viewport_size({"width": 320, "height": 700})
    assert chat.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    visit.complaints = [text for text in visit.complaints if "status of 503" not in text]


def test_what_a_conversation_is_asked_with(visit: Visit, chat: Page) -> None:
    sent = answer(chat, events("Yes."))
    chat.get_by_text("System prompt: none").click()
    chat.get_by_label("System prompt").fill("Be brief.")
    chat.get_by_text("Parameters").click()
    # An empty field shows what the model's own files name.
    expect(chat.get_by_label("Temperature")).to_have_attribute("placeholder", "0.7")
    expect(chat.get_by_label("Max tokens")).to_have_attribute("placeholder", "128")
    for label, value in (("Top p", "0.5"), ("Max tokens", "32"), ("Seed", "7"), ("Stop at", "END\n###")):
        chat.get_by_label(label).fill(value)
    assert visit.faults() == []
    asked(chat, "Is it so?", 1)
    assert sent == [{
        "model": "small", "messages": [{"role": "system", "content": "Be brief."}, *words("Is it so?")],
        "temperature": 0.7, "top_p": 0.5, "max_tokens": 32, "seed": 7, "stop": ["END", "###"],
        "stream": True, "stream_options": {"include_usage": True},
    }]  # fmt: skip
    chat.reload()  # the settings are the conversation's, and stay with it
    expect(chat.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(chat.get_by_text("max_tokens 32, temperature 0.7, top_p 0.5, seed 7")).to_be_visible()


def test_the_last_turn_is_asked_anew_edited_and_copied(visit: Visit, chat: Page) -> None:
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    sent = answer(chat, *[events(f"Answer {number}.") for number in range(4)])
    asked(chat, "One", 1)
    asked(chat, "Two", 2)
    chat.get_by_role("button", name="Regenerate").click()
    expect(chat.locator(".message-assistant").last).to_contain_text("Answer 2.")
    assert sent[2]["messages"] == sent[1]["messages"]
    expect(chat.get_by_role("button", name="Edit")).to_have_count(1)  # of the last question alone
    chat.get_by_role("button", name="Edit").press("Enter")
    field = chat.get_by_label("Message")
    expect(field).to_be_focused()
    expect(field).to_have_value("Two")
    chat.keyboard.press("Escape")
    expect(field).to_have_value("")
    expect(chat.get_by_text("to be asked anew")).to_have_count(0)
    chat.get_by_role("button", name="Edit").press("Enter")
    expect(field).to_have_value("Two")
    field.fill("Three\nlines")
    chat.keyboard.press("Enter")
    expect(chat.locator(".message-assistant").last).to_contain_text("Answer 3.")
    expect(chat.locator(".message-user")).to_have_count(2)
    assert sent[3]["messages"] == words("One", "Answer 0.", "Three\nlines")
    last = chat.locator(".message-assistant").last
    last.get_by_role("button", name="Copy").click()
    expect(last.get_by_role("button", name="Copied")).to_be_visible()
    assert chat.evaluate("navigator.clipboard.readText()") == "Answer 3."
    # Over plain HTTP from another host a page has no clipboard.
    chat.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined, writable: true })")
    question = chat.locator(".message-user").first
    question.get_by_role("button", name="Copy").click()
    expect(question.get_by_role("button", name="Copied")).to_be_visible()
    chat.reload()
    assert chat.evaluate("navigator.clipboard.readText()") == "One"
    assert visit.faults() == []


@pytest.mark.parametrize("leave", ["stop", "jobs", "new"])
def test_a_question_without_an_answer_is_kept(chat: Page, leave: str) -> None:
    sent = answer(chat, None, events("At last."))
    with chat.expect_request("**/v1/chat/completions"):
        ask(chat, "Are you there?")
    if leave == "stop":
        chat.get_by_role("button", name="Stop").click()
    elif leave == "jobs":
        chat.get_by_role("link", name="Jobs").click()
        expect(chat.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
        assert "conversation" not in chat.url
        chat.go_back()
    else:
        chat.get_by_role("button", name="New chat").click()
        expect(chat.locator(".message")).to_have_count(0)
        chat.get_by_role("button", name="Are you there?").click()
    chat.get_by_role("button", name="Ask small").click()
    expect(chat.locator(".message-assistant")).to_contain_text("At last.")
    assert sent[0] == sent[1]


def test_conversations_are_listed_opened_exported_and_deleted(visit: Visit, chat: Page) -> None:
    answer(chat, events("Hello."), events("Fine."))
    asked(chat, "Hi", 1)
    chat.get_by_role("button", name="New chat").click()
    expect(chat.locator(".message")).to_have_count(0)
    asked(chat, "How are you?  " + "Tell me. " * 20, 1)
    kept = chat.get_by_role("complementary", name="Conversations")
    expect(kept.get_by_role("listitem")).to_have_count(2)
    expect(kept).to_contain_text("Conversations (2)")
    kept.get_by_role("button", name="Hi", exact=True).press("Enter")
    expect(chat.locator(".message-assistant")).to_contain_text("Hello.")
    assert visit.faults() == []
    with chat.expect_download() as download:
        kept.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "hi.json"
    exported = json.loads(Path(download.value.path()).read_text())
    assert exported["title"] == "Hi"
    assert exported["conversations"] == [{"model": "small", "messages": words("Hi", "Hello.")}]
    kept.get_by_role("button", name="Delete").click()
    assert visit.faults() == []
    chat.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(kept.get_by_role("listitem")).to_have_count(1)
    expect(chat.locator(".message")).to_have_count(0)
    assert [each["turns"][0]["question"][:3] for each in stored(chat)] == ["How"]


GOOD = {
    "id": "1", "at": 5, "models": ["small"], "system": "", "parameters": {},
    "turns": [{"question": "Old", "answers": [{"model": "small", "content": "Yes."}]}],
}  # fmt: skip


def with_stored(page: Page, text: str) -> None:
    """The page, opened anew in a browser that keeps this text."""
    page.evaluate("([place, text]) => localStorage.setItem(place, text)", [PLACE, text])
    page.reload()
    expect(page.get_by_label("Message")).to_be_visible()


@pytest.mark.parametrize(
    "text",
    ["{", "null", "3", '{"conversations": 3}', json.dumps({"conversations": [None, {"id": 1}, GOOD]}),
     json.dumps({"conversations": [GOOD | {"turns": [{"question": "x", "answers": [{"model": 1}]}]}]}),
     json.dumps({"conversations": [GOOD | {"at": 1e300, "turns": []}]})],
    ids=["no-json", "null", "a-number", "no-list", "some", "an-answer", "a-time"],
)  # fmt: skip
def test_what_cannot_be_read_breaks_nothing(visit: Visit, chat: Page, text: str) -> None:
    with_stored(chat, text)
    expect(chat.get_by_text("can't be read")).to_be_visible()
    answer(chat, events("Hello."))
    asked(chat, "Hi", 1)
    expect(chat.get_by_text("can't be read")).to_have_count(0)
    assert [each["turns"][0]["question"] for each in stored(chat)] == [
        "Hi",
        *(["Old"] if "Old" in text else []),
    ]
    chat.reload()
    expect(chat.locator(".message-assistant")).to_contain_text("Hello.")


@pytest.mark.parametrize(("count", "length", "left"), [(50, 1, 50), (6, 300_000, 4)], ids=["number", "size"])
def test_the_oldest_conversations_go(chat: Page, count: int, length: int, left: int) -> None:
    many = [GOOD | {"id": str(each), "at": each, "system": "x" * length} for each in range(1, count + 1)]
    with_stored(chat, json.dumps({"version": 1, "conversations": many}))
    kept = chat.get_by_role("complementary", name="Conversations")
    expect(kept.get_by_role("listitem")).to_have_count(count)
    expect(kept).to_contain_text("the newest 50 of all models, at most 1 MB. The oldest go.")
    answer(chat, events("Hello."))
    asked(chat, "Hi", 1)
    expect(kept.get_by_role("listitem")).to_have_count(left)
    newest = ["Hi", *[str(each) for each in range(count, count - left + 1, -1)]]
    assert [
        each["turns"][0]["question"] if each["id"] not in newest else each["id"] for each in stored(chat)
    ] == newest


def test_a_browser_without_room_says_so(chat: Page) -> None:
    chat.evaluate(
        "void (Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') })"
    )
    answer(chat, events("Hello."))
    asked(chat, "Hi", 1)
    expect(chat.get_by_text("no room for this conversation")).to_be_visible()


def test_a_chat_is_there_again(chat: Page) -> None:
    answer(chat, events("Hello."))
    ask(chat, "Hi")
    expect(chat.locator(".message-assistant")).to_contain_text("Hello.")
    chat.get_by_role("link", name="Jobs").click()
    expect(chat.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
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
