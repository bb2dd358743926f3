"""A conversation in the terminal, with somebody beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
from rich.console import Console

from app.client import NibbleClient
from app.commands.chat import Conversation, converse


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
