"""Chat templates: what they give, and what they can't do."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import ModelRefused
from workers.texts import chat_template
from workers.texts.chat_template import ChatTemplate, RefusedByTemplate

HELLO = [{"role": "user", "content": "Hello"}]


def test_a_model_without_a_template_gets_plain_lines() -> None:
    template = ChatTemplate(None, {})
    assert template.is_default
    assert template.render(HELLO, {"add_generation_prompt": True}) == "user: Hello\nassistant:"


def test_special_tokens_tools_and_arguments_reach_the_template() -> None:
    source = "{{ bos_token }}{{ tools | tojson }}{{ messages[0].content }}{{ mood }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render(HELLO, {"mood": "!"}, tools=[{"a": "é"}]) == '<s>[{"a": "é"}]Hello!'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.update(messages[0], role='system') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ messages[0].no.such.thing }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 10 ** (10 ** 5) % 2 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    ],
)
def test_what_a_template_may_not_do_is_refused(source: str) -> None:
    messages = [dict(message) for message in HELLO]
    with pytest.raises(RefusedByTemplate):
        ChatTemplate(source, {}).render(messages)
    assert messages == HELLO


@pytest.mark.parametrize("inner", ["", "x"])
def test_a_template_that_does_not_end_is_ended(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    source = "{% for a in range(4000) %}{% for b in range(4000) %}" + inner + "{% endfor %}{% endfor %}"
    with pytest.raises(RefusedByTemplate, match="longer than"):
        ChatTemplate(source, {}).render(HELLO)


def test_the_reason_is_the_templates_own() -> None:
    with pytest.raises(RefusedByTemplate, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(HELLO)


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "x" * 300_000, 5, {"default": "{% generation %}"}, {"tool_use": None, "default": ""}],
)
def test_a_template_that_is_none(source: Any) -> None:
    with pytest.raises(ModelRefused) as refusal:
        ChatTemplate(source, {})
    assert refusal.value.code == "chat_template_invalid"


CALL = {"id": "c1", "type": "function", "function": {"name": "visit", "arguments": '{"city": "Zürich"}'}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None}, "''"),
        ({}, "''"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "'a\\nb'"),
        ({"content": [{"type": "image"}]}, "[{'type': 'image'}]"),
        ({"content": None, "tool_calls": [CALL]}, "''visit{'city': 'Zürich'}"),
        ({"content": "x", "tool_calls": None}, "'x'"),
        ({"content": "x", "tool_calls": [{"function": {"name": "f"}}]}, "'x'f{}"),
        ({"content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "'x'f'{'"),
        ({"content": "x", "reasoning": "why"}, "'x'whywhy"),
        ({"content": "x", "reasoning_content": "why", "thinking": None}, "'x'whywhy"),
    ],
)
def test_messages_as_openai_writes_them_reach_templates_as_they_expect_them(
    message: dict[str, Any], expected: str
) -> None:
    source = (
        "{{ '%r' % (messages[0]['content'],) }}"
        "{% for call in messages[0].tool_calls or [] %}"
        "{{ call.function.name }}{{ '%r' % (call.function.arguments,) }}{% endfor %}"
        "{{ messages[0].thinking }}{{ messages[0].reasoning_content }}"
    )
    assert ChatTemplate(source, {}).render([{"role": "assistant", **message}]) == expected


def test_a_template_that_reads_parts_alone_gets_parts() -> None:
    """It would go through the letters of a string, and write nothing."""
    source = (
        "{% for message in messages %}{{ message.role }}:{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
    )
    messages = [*HELLO, {"role": "assistant", "content": None}, {"role": "user", "content": "And?"}]
    assert ChatTemplate(source, {}).render(messages) == "user:Hello;assistant:;user:And?;"
    continued = ChatTemplate(source, {}).render(HELLO, continue_final_message=True)
    assert continued == "user:Hello"


@pytest.mark.parametrize("content", ["m", "end", "im", "|", "Oslo ", ""])
def test_a_continued_message_ends_where_it_ends(content: str) -> None:
    """Its text may also stand in what the template writes behind it."""
    source = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    messages = [{"role": "assistant", "content": content}]
    assert ChatTemplate(source, {}).render(messages, continue_final_message=True) == "<|im_start|>" + content
    trimmed = ChatTemplate(source.replace("m.content", "m.content | trim"), {})
    assert trimmed.render(messages, continue_final_message=True) == "<|im_start|>" + content.strip()


def test_a_message_that_the_template_leaves_out_can_not_be_continued() -> None:
    template = ChatTemplate("{{ messages[0].role }}", {})
    with pytest.raises(RefusedByTemplate, match="does not write all of it"):
        template.render(HELLO, continue_final_message=True)


def test_several_templates_without_a_default_one_are_named() -> None:
    template = ChatTemplate({"rag": "x", "tool_use": "tools"}, {})
    assert template.render(HELLO, tools=[{}]) == "tools"
    with pytest.raises(RefusedByTemplate, match=r"\['rag', 'tool_use'\]"):
        template.render(HELLO)


def test_a_long_text_is_no_fault_of_the_template() -> None:
    text = "word " * 2_000_000
    assert ChatTemplate(None, {}).render([{"role": "user", "content": text}]) == f"user: {text}\n"
