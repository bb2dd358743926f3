"""Chat templates: what they give, and what they can't do."""

from __future__ import annotations

import pytest

from app.core.errors import InvalidRequest, ModelRefused
from workers.serving import chat_template
from workers.serving.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]


def test_a_model_without_a_template_gets_plain_lines() -> None:
    template = ChatTemplate(None, {})
    assert template.is_default
    assert template.render(HELLO, add_generation_prompt=True) == "user: Hello\nassistant:"


def test_special_tokens_tools_and_arguments_reach_the_template() -> None:
    source = "{{ bos_token }}{{ tools | tojson }}{{ messages[0].content }}{{ mood }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render(HELLO, tools=[{"a": "é"}], mood="!") == '<s>[{"a": "é"}]Hello!'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].no.such.thing }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    ],
)
def test_what_a_template_may_not_do_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ChatTemplate(source, {}).render(HELLO)
    assert refusal.value.param == "messages"


@pytest.mark.parametrize("inner", ["", "x"])
def test_a_template_that_does_not_end_is_ended(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    source = "{% for a in range(4000) %}{% for b in range(4000) %}" + inner + "{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="longer than"):
        ChatTemplate(source, {}).render(HELLO)


def test_the_reason_is_the_templates_own() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(HELLO)


@pytest.mark.parametrize("source", ["{% if %}", "x" * 300_000])
def test_a_template_that_is_none(source: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        ChatTemplate(source, {})
    assert refusal.value.code == "chat_template_invalid"
