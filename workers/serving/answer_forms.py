"""How families write tool calls and reasoning, one row each; a model's chat template says which row is its.

What a row says is cut out of a stream by transformers' parser of responses, in whose words a region is
described (`transformers.utils.chat_parsing`, 5.24): it holds back what may be the start of a marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers.utils.chat_parsing.content_parsers import parse_content

Properties = Mapping[str, Any]  # of a tool's parameters


class WrittenCall(NamedTuple):
    """A call as the model wrote it; values of tags are still text where `typed` is false."""

    name: str
    arguments: dict[str, Any]
    typed: bool = True


@dataclass(frozen=True)
class CallForm:
    """A family's tool calls. `read` takes a region's text; it raises ValueError or KeyError for no call."""

    name: str
    marks: tuple[str, ...]  # all of them stand in the templates of the family
    region: Mapping[str, Any]  # where a call, or several, are
    read: Callable[[str], list[WrittenCall]]
    ends: tuple[str, ...] = ()  # marks after the last call, or after each
    short_ids: bool = False  # nine letters and digits, or the template refuses the conversation later
    whole_text: bool = False  # a region begins at the start of the text alone


@dataclass(frozen=True)
class ReasoningForm:
    """A family's reasoning; `content` where the answer itself stands between markers too."""

    marks: tuple[str, ...]
    region: Mapping[str, Any]
    content: Mapping[str, Any] | None = None
    opening: str = ""  # what ends the prompt where the template begins the reasoning itself


def one_call(text: str, key: str = "arguments") -> list[WrittenCall]:
    """`{"name": …, "arguments": {…}}`, or a list of them, or several one after another."""
    decoder, calls, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        calls += value if isinstance(value, list) else [value]
        at += len(text[at:]) - len(text[at:].lstrip(" \n\t\r;,"))
    return [called(each, key) for each in calls]


def called(value: Any, key: str) -> WrittenCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")  # noqa: TRY004  # of the text, not of a program
    arguments = value.get(key, value.get("parameters", value.get("arguments", {})))
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return WrittenCall(value["name"], an_object(arguments))


def an_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")  # noqa: TRY004  # of the text, not of a program
    return value


def named(pattern: str) -> Callable[[str], list[WrittenCall]]:
    """A name, a separator and the arguments as JSON: groups `name` and `arguments`."""
    form = re.compile(pattern, re.DOTALL)

    def read(text: str) -> list[WrittenCall]:
        match = form.fullmatch(text.strip())
        if match is None:
            raise ValueError("no call")
        return [WrittenCall(match["name"], an_object(json.loads(match["arguments"].strip() or "{}")))]

    return read


def tagged(name: str, argument: str) -> Callable[[str], list[WrittenCall]]:
    """A name and a tag for each argument: groups `name`, and `key` with `value`."""
    head, item = re.compile(name, re.DOTALL), re.compile(argument, re.DOTALL)

    def read(text: str) -> list[WrittenCall]:
        match = head.match(text.strip())
        if match is None:
            raise ValueError("no call")
        values = {each["key"].strip(): each["value"] for each in item.finditer(text)}
        return [WrittenCall(match["name"].strip(), values, typed=False)]

    return read


def braced(string: str) -> Callable[[str], list[WrittenCall]]:
    """Gemma's `call:name{key:value}`, whose strings stand between `string` twice."""
    form = re.compile(r"call:(?P<name>[^{\s]+)\s*(?P<arguments>\{.*\})", re.DOTALL)
    arguments = {"string_delims": [[string, string]], "unquoted_keys": True}

    def read(text: str) -> list[WrittenCall]:
        match = form.fullmatch(text.strip())
        if match is None:
            raise ValueError("no call")
        return [WrittenCall(match["name"], an_object(parse_content(match["arguments"], "json", arguments)))]

    return read


def mistral(text: str) -> list[WrittenCall]:
    """A list of calls, or since version 11 of its tokenizers a name with its arguments."""
    text = text.strip()
    if text.startswith("["):
        return one_call(text)
    return named(r"(?P<name>[^\[{\s]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?P<arguments>\{.*\})")(text)


def pythonic(text: str) -> list[WrittenCall]:
    """`[name(key=value), …]`, without evaluating anything."""
    calls = parse_content(text.strip(), "python-call-list", {})
    return [WrittenCall(each["name"], each["arguments"]) for each in calls]


def region(begin: str, end: str | None, *, pattern: bool = False) -> dict[str, Any]:
    """A region of text between two markers; without `end` it lasts until the text's."""
    suffix = "_pattern" if pattern else ""
    edges = {f"open{suffix}": begin} | ({f"close{suffix}": end} if end else {})
    return {**edges, "content": "text", "content_args": {"strip": False}, "repeats": True}


def harmony_call(text: str) -> list[WrittenCall]:
    """The region begins with `to=functions.NAME`, as the header of its message says it."""
    return named(r"(?P<name>[^\s<]+)[^{]*?<\|message\|>(?P<arguments>.*)")(text)


HARMONY_CALL = r"(?:<\|start\|>assistant )?(?:<\|channel\|>commentary )?to=functions\."
# In this order: a template with the marks of several rows is of the first of them.
CALL_FORMS = (
    CallForm("harmony", ("<|channel|>", "<|message|>"),
             region(HARMONY_CALL, r"<\|call\|>|<\|end\|>", pattern=True), harmony_call),
    CallForm("mistral", ("[TOOL_CALLS]",),
             region(r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])", pattern=True), mistral, short_ids=True),
    CallForm("deepseek", ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
             region(r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>",
                    r"<｜tool▁call▁end｜>", pattern=True),
             named(r"(?:function<｜tool▁sep｜>)?(?P<name>[^<\s]+)(?:<｜tool▁sep｜>|\s*```(?:json)?)"
                   r"(?P<arguments>.*?)(?:```)?"), ends=("<｜tool▁calls▁end｜>",)),
    CallForm("kimi", ("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
             region(r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>",
                    r"<\|tool_call_end\|>", pattern=True),
             named(r"(?:functions\.)?(?P<name>[^<:\s]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
                   r"(?P<arguments>.*)"),
             ends=("<|tool_calls_section_end|>",)),
    CallForm("gemma", ("<|tool_call>", "<tool_call|>"),
             region("<|tool_call>", "<tool_call|>"), braced('<|"|>')),
    CallForm("functiongemma", ("<start_function_call>",),
             region("<start_function_call>", "<end_function_call>"), braced("<escape>")),
    CallForm("glm", ("<tool_call>", "<arg_key>"), region("<tool_call>", "</tool_call>"),
             tagged(r"(?P<name>[^\s<]+)",
                    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>")),
    CallForm("qwen3-coder", ("<function=", "<parameter="),
             region(r"(?:<tool_call>\s*)?<function=", r"</function>", pattern=True),
             tagged(r"(?P<name>[^>\s]+)>", r"<parameter=(?P<key>[^>]+)>\n?(?P<value>.*?)\n?</parameter>"),
             ends=("</tool_call>",)),
    CallForm("hermes", ("<tool_call>",), region("<tool_call>", "</tool_call>"), one_call),
    CallForm("lfm2", ("<|tool_call_start|>",), region("<|tool_call_start|>", "<|tool_call_end|>"), pythonic),
    CallForm("olmo3", ("<function_calls>",), region("<function_calls>", "</function_calls>"),
             lambda text: pythonic("[" + ", ".join(text.split("\n")).strip(" ,") + "]")),
    CallForm("llama3", ("<|start_header_id|>", '"parameters"'),
             region(r"(?:\A\s*|<\|python_tag\|>\s*)(?=\{)", None, pattern=True),
             lambda text: one_call(text, "parameters"), whole_text=True),
    CallForm("pythonic", ("func_name1(",),
             region(r"(?:\A\s*|<\|python_start\|>\s*)(?=\[)", r"<\|python_end\|>", pattern=True), pythonic,
             whole_text=True),
)  # fmt: skip

REASONING_FORMS = (
    ReasoningForm(("<|channel|>", "<|message|>"),
                  region("<|channel|>analysis<|message|>", "<|end|>"),
                  region(r"<\|channel\|>(?:final|commentary)(?: ?<\|constrain\|>[^<]*)?<\|message\|>",
                         r"<\|end\|>|<\|return\|>", pattern=True)),
    ReasoningForm(("<|channel>thought",), region(r"<\|channel>thought\n?", r"<channel\|>", pattern=True),
                  opening="<|channel>thought"),
    ReasoningForm(("[THINK]",), region("[THINK]", "[/THINK]"), opening="[THINK]"),
    ReasoningForm(("<seed:think>",), region("<seed:think>", "</seed:think>"), opening="<seed:think>"),
    ReasoningForm(("<think>",), region("<think>", "</think>"), opening="<think>"),
    ReasoningForm(("</think>",), region("<think>", "</think>"), opening="<think>"),
)  # fmt: skip


@dataclass(frozen=True)
class AnswerForms:
    """What a model's template says of its answers; None where it knows neither."""

    calls: CallForm | None = None
    reasoning: ReasoningForm | None = None

    @classmethod
    def of_template(cls, template: str) -> AnswerForms:
        return cls(first_of(CALL_FORMS, template), first_of(REASONING_FORMS, template))


def first_of(forms: Any, template: str) -> Any:
    return next((form for form in forms if all(mark in template for mark in form.marks)), None)


def typed_arguments(call: WrittenCall, schemas: Mapping[str, Properties]) -> dict[str, Any]:
    """Values of tags by the types that the tool declares: text stays text where it may."""
    if call.typed:
        return call.arguments
    properties = schemas.get(call.name, {})
    return {key: typed(value, properties.get(key)) for key, value in call.arguments.items()}


def typed(text: str, schema: Any) -> Any:
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds == ["string"]:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)
    return text if "string" in kinds and not (value is None and "null" in kinds) else value
