"""A conversation in the terminal, with somebody beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
from rich.console import Console

from app.client import NibbleClient
from app.commands.chat import Conversation, Pace, command, converse


class Echo:
    """Answers with the last message, in capitals."""

    def chat(self, body: Mapping[str, Any], **_: object) -> Iterator[dict[str, Any]]:
        yield {"choices": [{"delta": {"content": body["messages"][-1]["content"].upper()}}]}


def test_who_is_beside_sees_each_question_before_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["first", "/help", "", "second"])

    def typed(*_: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    out, seen = io.StringIO(), []
    talk = Conversation(model="small")
    converse(
        cast("NibbleClient", Echo()),
        talk,
        Console(file=out),
        beside=lambda conversation: seen.append([each["content"] for each in conversation.exchanges]),
    )
    assert seen == [["first"], ["first", "FIRST", "second"]]
    assert out.getvalue().count("small ") == 2
    assert [each["content"] for each in talk.exchanges] == ["first", "FIRST", "second", "SECOND"]


def said(*lines: str) -> tuple[str, Conversation]:
    out, talk = io.StringIO(), Conversation(model="small")
    for line in lines:
        command(talk, line, Console(file=out, width=200))
    return out.getvalue(), talk


def test_a_command_that_does_not_exist_is_named() -> None:
    text, _ = said("/nix")
    assert text.startswith("unknown command /nix")
    assert "/undo" in text


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("temperature 9", "temperature is a number from 0 to 2, not 9"),
        ("top_k 1.5", "top_k is a whole number of at least 0, not 1.5"),
        ("max_tokens", "max_tokens is a whole number of at least 1, not nothing"),
        ("temperature nan", "not nan"),
        ("warmth 1", "NAME one of temperature"),
    ],
)
def test_parameters_have_limits(written: str, why: str) -> None:
    text, talk = said(f"/set {written}")
    assert why in text
    assert talk.parameters == {}
    assert said("/set temperature 1.5")[1].parameters == {"temperature": 1.5}


def test_the_pace_of_a_conversation_is_that_of_all_its_answers() -> None:
    assert (Pace(10, 1.0) + Pace(50, 2.0)).tokens_per_s == 20.0
    assert Pace().tokens_per_s is None
