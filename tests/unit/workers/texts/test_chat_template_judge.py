"""Chat templates against transformers' own: the same text, or both refuse, in the forms of many families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.tiny_models import TOKENIZER
from workers.texts.chat_template import ChatTemplate, RefusedByTemplate, chat_template
from workers.texts.windows import load_tokenizer

SHAPES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
# What a shape can't hold, in transformers as here.
REFUSED = {
    ("gemma", "call"), ("gemma", "odd"), ("mistral", "odd"), ("llama3", "two calls"), ("gemma", "two calls"),
}  # fmt: skip
PLACES = {"type": "array", "items": {"type": "string"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "visit",
            "description": 'Go to a café & "look" <around>',
            "parameters": {
                "type": "object",
                "properties": {"places": PLACES, "days": {"type": "integer"}, "any": {}},
                "required": ["places"],
            },
        },
    }
]
CALL = {
    "id": "abc123def",
    "type": "function",
    "function": {"name": "visit", "arguments": {"places": ["Zürich", "Oslo"], "days": 2}},
}
USER = {"role": "user", "content": "  Where to?\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTo the sea. "}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "content": '{"weather": "cold"}'}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be brief — 短く."}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "And then?"}],
    "answered": [USER, ANSWER],
    "call": [USER, CALLING, RESULT, ANSWER],
    "two calls": [USER, {**CALLING, "tool_calls": [CALL, CALL]}, RESULT],
    "odd": [USER, USER],
    "reasoning": [USER, {"role": "assistant", "reasoning": "sea or hills", "content": "Sea"}],
}
SPECIAL = {"sep_token": "<sep>", "cls_token": "<cls>", "mask_token": "<mask>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def judge() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def outcome(render: Any) -> tuple[str, str]:
    """The text, or the reason for which there is none."""
    try:
        return "text", render()
    except RefusedByTemplate as refusal:
        return "refused", str(refusal)
    except Exception as fault:  # noqa: BLE001  # whatever transformers lets through
        return "refused", str(fault)


def names(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_every_shape_gives_what_transformers_gives(
    judge: PreTrainedTokenizerBase, shape: Path, conversation: str
) -> None:
    judge.chat_template = shape.read_text("utf-8")
    ours, messages = chat_template(judge), CONVERSATIONS[conversation]
    for tools in (None, TOOLS):
        for prompt in (False, True):
            arguments = {"add_generation_prompt": prompt, "enable_thinking": False}
            expected = outcome(
                lambda tools=tools, arguments=arguments: judge.apply_chat_template(
                    messages, tools=tools, tokenize=False, **arguments
                )
            )
            found = outcome(
                lambda tools=tools, arguments=arguments: ours.render(messages, arguments, tools=tools)
            )
            assert found == expected
            assert (found[0] == "refused") == ((shape.stem, conversation) in REFUSED)


@pytest.mark.parametrize(
    "content", ["To the sea", "To the sea \n", "e", " <|im_end|> ", "", "a</think>\n\nb"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_a_last_message_is_continued_as_in_transformers(
    judge: PreTrainedTokenizerBase, shape: Path, content: str
) -> None:
    judge.chat_template = shape.read_text("utf-8")
    messages = [{"role": "user", "content": "Where to?"}, {"role": "assistant", "content": content}]
    expected = outcome(
        lambda: judge.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    )
    found = outcome(lambda: chat_template(judge).render(messages, continue_final_message=True))
    assert found[0] == expected[0]
    assert found[0] == "refused" or found == expected


WAYS = (
    "", "ensure_ascii=true", "ensure_ascii=false", "indent=2", "indent='\t'", "separators=(',', ':')",
    "sort_keys=true", "true", "false, 4", "false, none, (' , ', ' : '), true", "indent=0, sort_keys=false",
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_tojson_takes_every_argument_of_transformers(judge: PreTrainedTokenizerBase, way: str) -> None:
    judge.chat_template = "{{ tools | tojson(" + way + ") }}"
    found = chat_template(judge).render([USER], tools=TOOLS)
    assert found == judge.apply_chat_template([USER], tools=TOOLS, tokenize=False)
    assert "visit" in found


def test_every_special_token_of_the_tokenizer_reaches_the_template(judge: PreTrainedTokenizerBase) -> None:
    judge.chat_template = "".join("{{ " + name + " }};" for name in judge.special_tokens_map)
    found = chat_template(judge).render([USER])
    assert found == judge.apply_chat_template([USER], tokenize=False)
    assert set(SPECIAL.values()) <= set(found.split(";"))


def test_arguments_of_a_request_win_over_special_tokens(judge: PreTrainedTokenizerBase) -> None:
    judge.chat_template = "{{ bos_token }}{{ mood }}{{ messages[0].content }}"
    found = chat_template(judge).render([USER], {"bos_token": "!", "mood": "?", "self": "", "args": ""})
    assert found == judge.apply_chat_template([USER], tokenize=False, bos_token="!", mood="?")
    assert found == "!?" + USER["content"]


NAMED = {"default": "plain", "tool_use": "tools", "rag": "{% broken"}


@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize("left_out", ["", "tool_use", "default"])
def test_of_several_templates_the_one_that_transformers_chooses(
    judge: PreTrainedTokenizerBase, left_out: str, tools: list[dict[str, Any]] | None
) -> None:
    judge.chat_template = {name: source for name, source in NAMED.items() if name != left_out}
    found = outcome(lambda: chat_template(judge).render([USER], tools=tools))
    expected = outcome(lambda: judge.apply_chat_template([USER], tools=tools, tokenize=False))
    assert found[0] == expected[0]
    assert found[0] == "refused" or found == expected


def test_a_namespace_and_dict_reach_no_further_than_in_transformers(judge: PreTrainedTokenizerBase) -> None:
    for source in (
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.update(messages[0], role='system') }}",
        "{{ raise_exception('no') }}",
    ):
        judge.chat_template = source
        assert outcome(lambda: judge.apply_chat_template([USER], tokenize=False))[0] == "refused"
        assert outcome(lambda: chat_template(judge).render([USER]))[0] == "refused"


def test_no_template_is_plain_lines() -> None:
    assert ChatTemplate(None, {}).render([{"role": "user", "content": "Hi"}]) == "user: Hi\n"
