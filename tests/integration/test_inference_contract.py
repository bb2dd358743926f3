"""The OpenAI contract, through OpenAI's own Python client."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer

from tests.integration.inference_process import NAME, InferenceProcess
from tests.tiny_models import TOKENIZER

BUNDLED = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
CLOSING = {"logit_bias": {str(BUNDLED.token_to_id("}")): 50}}
STRONG = {"repetition_penalty": 10.0}
HELLO: list[Any] = [{"role": "user", "content": "Say something"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "year": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["city", "year"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "visit", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def client(inference: InferenceProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=inference.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def chat(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    options = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0, **options}
    answer = client.chat.completions.create(**options)
    assert isinstance(answer, ChatCompletion)
    return answer


def streamed(client: openai.OpenAI, **options: Any) -> list[ChatCompletionChunk]:
    options = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0, **options}
    return list(client.chat.completions.create(stream=True, **options))


def text_of(answer: ChatCompletion, index: int = 0) -> str:
    content = answer.choices[index].message.content
    assert content is not None
    return content


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "nibble"


def test_a_chat_completion(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    whole, chunks = chat(client), streamed(client)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        "length"
    ]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_when_asked_for(client: openai.OpenAI) -> None:
    *before, last = streamed(client, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    assert all(chunk.choices and chunk.usage is None for chunk in before)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_strings_are_withheld_across_tokens(client: openai.OpenAI, stream: bool) -> None:
    whole = text_of(chat(client))
    stop = whole[4:9]
    assert len(stop) == 5
    if stream:
        chunks = streamed(client, stop=[stop, "never"])
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = chat(client, stop=[stop, "never"])
        text, reason = text_of(answer), answer.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_stop_string_may_be_kept(client: openai.OpenAI) -> None:
    whole = text_of(chat(client))
    answer = chat(client, stop=whole[4:9], extra_body={"include_stop_str_in_output": True})
    assert text_of(answer) == whole[: whole.index(whole[4:9]) + 5]


def test_seeds_repeat_and_differ(client: openai.OpenAI) -> None:
    one, same, other = (text_of(chat(client, temperature=1, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_max_completion_tokens(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    "body", [{"top_p": 0.0001}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}],
    ids=["top_p", "top_k", "min_p"],
)  # fmt: skip
def test_a_distribution_cut_to_its_top_is_greedy(client: openai.OpenAI, body: dict[str, Any]) -> None:
    assert text_of(chat(client, temperature=1, **body)) == text_of(chat(client))


def test_biased_tokens_come_and_penalties_drive_them_away(client: openai.OpenAI) -> None:
    word = BUNDLED.decode([600])
    assert text_of(chat(client, logit_bias={"600": 100})) == word * 12
    assert text_of(chat(client, extra_body={"allowed_token_ids": [600]})) == word * 12
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": STRONG}):
        allowed = {"allowed_token_ids": [600, 601], **penalty.get("extra_body", {})}
        answer = chat(client, **{**penalty, "extra_body": allowed})
        assert set(BUNDLED.encode(text_of(answer)).ids) == {600, 601}


def test_n_choices(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, temperature=1, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [text_of(answer, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    chunks = streamed(client, n=3, temperature=1, seed=3)
    joined = ["", "", ""]
    for chunk in chunks:
        joined[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert joined == texts
    ends = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason]
    assert sorted(ends) == [0, 1, 2]


def test_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    assert len(entries) == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy: the best is the one
        assert entry.logprob <= 0
        assert sum(math.exp(each.logprob) for each in entry.top_logprobs) <= 1 + 1e-5
    content = b"".join(bytes(entry.bytes or ()) for entry in entries)
    assert content.decode(errors="replace") == text_of(answer)
    chunks = streamed(client, logprobs=True, top_logprobs=3)
    again = [each for chunk in chunks if (found := chunk.choices[0].logprobs) for each in found.content or ()]
    assert [each.token for each in again] == [entry.token for entry in entries]


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    logprobs = chat(client, logprobs=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [each.top_logprobs for each in logprobs.content] == [[]] * 12


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_schema(client: openai.OpenAI, temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "visit", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=wanted, max_tokens=100, temperature=temperature)
    visit = json.loads(text_of(answer))
    assert answer.choices[0].finish_reason == "stop"
    assert visit["city"] in ("Rome", "Oslo")
    assert 0 <= visit["year"] < 100


def test_json_object(client: openai.OpenAI) -> None:
    """A random model rarely closes what it opens: with a bias for the brace it does."""
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=100, extra_body=CLOSING)
    assert isinstance(json.loads(text_of(answer)), dict)


def test_a_schema_that_can_t_be_kept_to_is_refused(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError) as refusal:
        chat(client, response_format=wanted)
    assert refusal.value.code == "invalid_json_schema"
    assert refusal.value.param == "response_format"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "visit"}}])
def test_demanded_tool_calls(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    options = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 120}
    if stream:
        calls = [
            call
            for chunk in streamed(client, **options)
            for call in chunk.choices[0].delta.tool_calls or ()
            if call.function
        ]
        name = "".join(call.function.name or "" for call in calls if call.function)
        arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    else:
        message = chat(client, **options).choices[0].message
        assert message.content is None
        assert message.tool_calls is not None
        call = message.tool_calls[0]
        assert call.type == "function"
        name, arguments = call.function.name, call.function.arguments
    assert name == "visit"
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")


def test_a_model_without_a_form_of_calls_says_so(client: openai.OpenAI) -> None:
    """Its template shows no tools: a call that it wrote of its own accord could not be told from text."""
    with pytest.raises(openai.BadRequestError, match="has no form of tool calls that is known") as refusal:
        chat(client, tools=[TOOL])
    assert refusal.value.code == "tool_form_unknown"
    assert "set tool_choice to required" in str(refusal.value)
    assert text_of(chat(client, tools=[TOOL], tool_choice="none")) == text_of(chat(client))


def test_content_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Say something"}]
    assert text_of(chat(client, messages=[{"role": "user", "content": parts}])) == text_of(chat(client))


def test_text_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=NAME, prompt=["The city", "A river"], max_tokens=6, temperature=0, n=1, echo=True
    )
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("The city")
    alone = client.completions.create(model=NAME, prompt="A river", max_tokens=6, temperature=0)
    assert answer.choices[1].text == "A river" + alone.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_text_completions_of_tokens_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=NAME, prompt=[[5, 6], [7]], max_tokens=4, temperature=0, logprobs=2
    )
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.top_logprobs is not None
        assert len(choice.logprobs.tokens) == 4
        assert all(0 < len(top) <= 2 for top in choice.logprobs.top_logprobs)
    chunks = list(
        client.completions.create(model=NAME, prompt=[5, 6], max_tokens=4, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "messages"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop.0"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"extra_body": {"guided_json": "no schema"}}, "guided_json"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ],
)
def test_invalid_values_are_named(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        chat(client, **options)
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.param == param
    assert "message" in refusal.value.body  # type: ignore[operator]  # OpenAI's error object


def test_a_prompt_that_is_too_long_names_the_limit(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "word " * 300}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as refusal:
        chat(client, messages=long)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="and 250 were asked for"):
        chat(client, max_tokens=250)


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        chat(client, model="another")
    assert refusal.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_unknown_fields_are_accepted(client: openai.OpenAI) -> None:
    body = {"reasoning_effort": "low", "no_such_field": [1], "metadata": {"a": "b"}, "user": "someone"}
    assert text_of(chat(client, extra_body=body)) == text_of(chat(client))


def test_many_requests_at_once_are_answered_as_alone(
    client: openai.OpenAI, inference: InferenceProcess
) -> None:
    requests = [
        {"messages": HELLO, "max_tokens": 8 + seed, "temperature": 0.9, "seed": seed, "top_p": 0.8}
        for seed in range(12)
    ]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=inference.url + "/v1", api_key="none", timeout=60) as made:
            create: Any = made.chat.completions.create
            answers = await asyncio.gather(*(create(model=NAME, **request) for request in requests))
        return [text_of(answer) for answer in answers]

    alone = [text_of(chat(client, **request)) for request in requests]
    assert asyncio.run(together()) == alone
