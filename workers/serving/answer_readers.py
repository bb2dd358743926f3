"""An answer's text as it comes, read as what it is: content, reasoning and calls of tools.

Every route that holds conversations takes its answers from here, so that a stream and a whole answer, and
OpenAI's and Anthropic's forms, say the same.
"""

from __future__ import annotations

import json
import re
import secrets
import string
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from transformers.utils.chat_parsing import ResponseParser

from workers.serving.answer_forms import AnswerForms, CallForm, Properties, WrittenCall, typed_arguments

SHORT_ID = 9  # characters
# ResponseParser cuts a prompt at an anchor; here it gets no more than an opened region.
NO_ANCHOR = r"(?!)"
CALLS, REASONING, CONTENT, ENDS = "tool_calls", "thinking", "content", "ends"


@dataclass(frozen=True)
class TextAdded:
    kind: Literal["content", "reasoning"]
    text: str


@dataclass(frozen=True)
class CallBegun:
    index: int  # among the calls of the answer
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsAdded:
    """JSON, as much of it as is there."""

    index: int
    text: str


Event = TextAdded | CallBegun | ArgumentsAdded


class AnswerReader(Protocol):
    """Reads one answer. `called` is whether the model itself chose to call a tool."""

    called: bool

    def read(self, text: str, *, last: bool) -> list[Event]:
        """What `text`, and `last` as the end, bring forth."""


class PlainReader:
    """Everything is content."""

    called = False

    def read(self, text: str, *, last: bool) -> list[Event]:
        return [TextAdded("content", text)] if text else []


class NamedCallReader:
    """All of the text is the arguments of the one tool that the request names."""

    called = False  # as OpenAI: a call that was named ends with `stop`

    def __init__(self, name: str, id: str) -> None:
        self._begun: list[Event] = [CallBegun(0, id, name)]

    def read(self, text: str, *, last: bool) -> list[Event]:
        begun, self._begun = self._begun, []
        return [*begun, ArgumentsAdded(0, text)] if text or begun else []


class CallNumbers:
    """Turns calls into events, with ids; a request may want one call at most."""

    def __init__(self, *, short_ids: bool = False, single: bool = False) -> None:
        self._short_ids, self._most = short_ids, 1 if single else None
        self.count = 0

    def events(self, call: WrittenCall, arguments: Mapping[str, Any]) -> list[Event]:
        if self.count == self._most:
            return []
        index = self.count
        self.count += 1
        text = json.dumps(arguments, ensure_ascii=False)
        return [CallBegun(index, call_id(short=self._short_ids), call.name), ArgumentsAdded(index, text)]


class CallListReader:
    """The text is a JSON list of calls, which a grammar keeps to; each is read when it is complete."""

    def __init__(self, numbers: CallNumbers) -> None:
        self._numbers = numbers
        self._rest = ""
        self._decoder = json.JSONDecoder()
        self.called = False

    def read(self, text: str, *, last: bool) -> list[Event]:
        self._rest += text
        events: list[Event] = []
        while "}" in text:
            start = self._rest.find("{")
            try:
                value, end = self._decoder.raw_decode(self._rest, max(start, 0))
            except ValueError:
                break
            self._rest = self._rest[end:]
            events += self._numbers.events(WrittenCall(value["name"], value["arguments"]), value["arguments"])
            self.called = True
        if last and not self.called and self._rest:  # it broke off before the first call was complete
            events.append(TextAdded("content", self._rest))
        return events


@dataclass
class FormReader:
    """Reads what the model writes of its own accord, in the form of its family."""

    forms: AnswerForms
    tools: Mapping[str, Properties]  # that may be called, with their parameters
    numbers: CallNumbers
    specials: re.Pattern[str] | None = None  # tokens that are no text and no marks
    begun: str = ""  # the region that the prompt has opened
    called: bool = False
    _held: str = ""  # white space that goes if a region ends or begins next
    _raw: str = ""  # of a region of calls
    _parser: ResponseParser = field(init=False)
    _fresh: bool = False  # whether white space before the next text goes

    def __post_init__(self) -> None:
        self._parser = ResponseParser(response_template(self.forms, with_calls=bool(self.tools)), self.begun)
        self._kind = REASONING if self.begun else CONTENT
        self._fresh = bool(self.begun)

    def read(self, text: str, *, last: bool) -> list[Event]:
        if self.specials is not None:
            text = self.specials.sub("", text)
        outcomes = list(self._parser.feed(text))
        if last:
            outcomes += self._parser.finalize()[1]
        events = [event for each in outcomes for event in self._events(each)]
        if last and self._held and self._kind == CONTENT:
            events.append(TextAdded("content", self._held))
        return joined(events)

    def _events(self, outcome: dict[str, Any]) -> Iterable[Event]:
        kind = outcome["field"]
        if outcome["type"] == "region_open":
            if kind != self._kind or kind == CALLS:
                self._held, self._fresh = "", kind != CONTENT or self._kind != CONTENT
            self._kind, self._raw = kind, ""
        elif outcome["type"] == "region_chunk" and kind == CALLS:
            self._raw += outcome["text"]
        elif outcome["type"] == "region_chunk":
            yield from self._text(kind, outcome["text"])
        elif kind == CALLS:
            yield from self._calls(self._raw)
        elif kind == REASONING:
            self._held, self._fresh = "", True

    def _text(self, kind: str, text: str) -> Iterable[Event]:
        text = text.lstrip() if self._fresh else text
        if not text:
            return
        self._fresh = False
        text = self._held + text
        whole = text.rstrip()
        self._held = text[len(whole) :]
        if whole:
            yield TextAdded("reasoning" if kind == REASONING else "content", whole)

    def _calls(self, text: str) -> Iterable[Event]:
        """The calls in a region's text; text that is no call of a tool that was offered stays text."""
        assert self.forms.calls is not None
        try:
            calls = self.forms.calls.read(text)
        except (ValueError, KeyError, TypeError, RecursionError):
            calls = []
        if not calls or any(call.name not in self.tools for call in calls):
            yield TextAdded("content", text)
            return
        for call in calls:
            self.called = True
            yield from self.numbers.events(call, typed_arguments(call, self.tools))


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbouring texts of a kind as one."""
    several: list[Event] = []
    for event in events:
        last = several[-1] if several else None
        if isinstance(event, TextAdded) and isinstance(last, TextAdded) and event.kind == last.kind:
            several[-1] = TextAdded(event.kind, last.text + event.text)
        else:
            several.append(event)
    return several


def response_template(forms: AnswerForms, *, with_calls: bool) -> dict[str, Any]:
    """The regions of an answer, as transformers' parser takes them."""
    reasoning = forms.reasoning
    fields: dict[str, Any] = {CONTENT: dict(reasoning.content) if reasoning and reasoning.content else PLAIN}
    if reasoning is not None:
        fields[REASONING] = dict(reasoning.region)
    if forms.calls is not None and with_calls:
        fields[CALLS] = dict(forms.calls.region)
        if forms.calls.ends:
            fields[ENDS] = {"open": list(forms.calls.ends), "close_pattern": ""}
    return {"start_anchor_pattern": NO_ANCHOR, "fields": fields}


PLAIN = {"content": "text", "content_args": {"strip": False}, "repeats": True}


def call_id(*, short: bool) -> str:
    if short:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(SHORT_ID))
    return f"call_{uuid.uuid4().hex}"


def specials_pattern(specials: Iterable[str], forms: CallForm | Any) -> re.Pattern[str] | None:
    """Matches the special tokens that the forms don't read."""
    marks = str(forms)
    others = [text for text in specials if text and re.escape(text) not in marks and text not in marks]
    others.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, others))) if others else None
