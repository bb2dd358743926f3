"""Requests whose own rules leave no token, and grammars that fail: an error in words, or the text's end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer

from app.core.errors import InvalidRequest
from tests.inference import Served
from tests.tiny_models import TOKENIZER, random_model, save_model
from workers.serving.constraints import Constraint
from workers.serving.detokenizer import Detokenizer
from workers.serving.grammar import Grammars
from workers.serving.requests import Choice, Generation, Sampling, Sequence, StopRules
from workers.serving.routes import create_app
from workers.serving.sampling import choose

TOKENS = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
END = 0
BODY = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 1, "seed": 3}
OBJECT = {"type": "object"}
# More ways to go on at one place than the parser follows: it fails after the first token.
WIDE = {"type": "object", "properties": {f"k{number}": {"type": "string"} for number in range(3000)}}
DUMPS = ("<state>", "grammar>", "Parser", "lexer", "ParserTooComplex", "\n")


def schema(content: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}}


def tokens_of(text: str) -> list[int]:
    found: list[int] = TOKENS.encode(text).ids
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(save_model(random_model("llama"), tmp_path_factory.mktemp("model")))


def ask(served: Served, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """The answers to completion requests that come together."""

    async def run() -> list[httpx.Response]:
        served.served.bind(asyncio.get_running_loop())
        transport = httpx.ASGITransport(create_app(served.served))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await asyncio.gather(
                *(client.post("/v1/completions", json=BODY | body) for body in bodies)
            )

    return asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    ("rules", "param", "named"),
    [
        (
            {"allowed_token_ids": [END], "min_tokens": 2},
            "allowed_token_ids",
            ["allowed_token_ids", "min_tokens"],
        ),
        (
            {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1},
            "allowed_token_ids",
            ["min_tokens"],
        ),
        (schema(OBJECT) | {"allowed_token_ids": [600]}, "allowed_token_ids", ["response_format"]),
        (
            schema({"type": "integer"}) | {"stop_token_ids": list(range(1, 4096)), "min_tokens": 4},
            "response_format",
            ["response_format", "min_tokens"],
        ),
    ],
    ids=["end banned", "stop banned", "schema", "schema's tokens banned"],
)
def test_rules_that_leave_no_token_are_refused(
    served: Served, rules: dict[str, Any], param: str, named: list[str], temperature: float, stream: bool
) -> None:
    """And neighbours of the same batch are served."""
    refused, fine = ask(served, rules | {"temperature": temperature, "stream": stream}, {})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "no_token_allowed", param)
    assert all(name in error["message"] for name in named), error["message"]
    assert fine.status_code == 200


def test_a_contradiction_amid_a_stream_is_an_error_event(served: Served) -> None:
    """The first brace is allowed, and nothing that may follow it."""
    brace = tokens_of("{")[-1]
    (answer,) = ask(served, schema(OBJECT) | {"allowed_token_ids": [brace], "stream": True})
    *_, error, done, rest = answer.text.split("\n\n")
    assert (answer.status_code, done, rest) == (200, "data: [DONE]", "")
    told = json.loads(error.removeprefix("data: "))["error"]
    assert (told["type"], told["code"]) == ("invalid_request_error", "no_token_allowed")
    assert "after 1 generated ones" in told["message"]


@pytest.mark.parametrize(
    "rules", [{"allowed_token_ids": tokens_of('"a')}, {"min_tokens": 9}, {"ignore_eos": True}]
)
def test_a_complete_text_ends_where_nothing_may_follow(served: Served, rules: dict[str, Any]) -> None:
    """The end token is not allowed, or banned; the text is what the schema demands."""
    letters = list(dict.fromkeys(tokens_of('"') + tokens_of("a") + tokens_of('"a"')))
    more = {"allowed_token_ids": letters} if "allowed_token_ids" in rules else rules
    (answer,) = ask(served, schema({"enum": ["a"]}) | more)
    choice = answer.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ('"a"', "stop")


def test_a_grammar_beyond_the_parsers_limits_is_refused_in_words(served: Served) -> None:
    """It was the end of the text before: `{` alone, as if it kept to the schema."""
    refused, fine = ask(served, schema(WIDE), {})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (
        400, "invalid_json_schema", "response_format"
    )  # fmt: skip
    assert "too large" in error["message"]
    assert not any(dump in error["message"] for dump in DUMPS)
    assert fine.status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        {"not": {}}, {"type": "nope"}, {"$ref": "http://x/y"}, {"$ref": "#/definitions/x"}, {"enum": []},
        {"type": "string", "pattern": "(?=a)"}, {"type": "string", "pattern": "("}, {"properties": 5},
        {"type": "string", "minLength": 5, "maxLength": 2}, {"type": "string", "format": "nope"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"type": "array", "uniqueItems": True},
        {"type": "string", "pattern": "(" * 500 + "a" + ")" * 500}, {"x" * 5000: 1, "not": {}},
    ],
    ids=lambda content: str(content)[:40],
)  # fmt: skip
def test_no_refusal_of_a_schema_holds_the_parsers_state(served: Served, content: dict[str, Any]) -> None:
    (answer,) = ask(served, schema(content))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "invalid_json_schema",
        "response_format",
    )
    assert not any(dump in error["message"] for dump in DUMPS), error["message"]
    assert len(error["message"]) < 450


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "contradict each other"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "contradict each other"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "contradict each other"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "contradict each other"),
        ({"enum": []}, "allow at least one value"),
        ({"type": []}, "allow at least one value"),
        ({"not": {}}, "keywords and formats that constrained decoding knows"),
        ({"type": "string", "format": "nope"}, "keywords and formats that constrained decoding knows"),
        ({"type": "nope"}, "correct it there"),
        ({"$ref": "#/definitions/x"}, "correct it there"),
        ({"type": "string", "pattern": "("}, "correct it there"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_remedy_fits_what_is_wrong_with_a_schema(
    served: Served, content: dict[str, Any], remedy: str
) -> None:
    """Each was told to use keywords that are known, also where all were."""
    (answer,) = ask(served, schema(content))
    assert answer.status_code == 400
    assert remedy in answer.json()["error"]["message"]


def test_biases_add_and_ban_nothing(served: Served) -> None:
    """As OpenAI describes them: the same bias on every token changes no token."""
    plain, biased = ask(served, {}, {"logit_bias": {str(token): -100 for token in range(4096)}})
    assert biased.status_code == 200
    assert biased.json()["choices"][0]["text"] == plain.json()["choices"][0]["text"]


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0])
def test_a_tiny_penalty_leaves_the_other_rules_in_force(temperature: float) -> None:
    """Scores divided by it are infinite; they were no probabilities, and the last token was drawn."""
    sampling = Sampling(temperature=temperature, repetition_penalty=1e-300, allowed_token_ids=(1, 2), seed=1)
    generation = Generation("x", (1, 2, 3), sampling, StopRules(4), print)
    sequence = Sequence(generation, 0, Detokenizer(TOKENS))
    for _ in range(20):
        (choice,) = choose(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), [sequence], frozenset())
        assert isinstance(choice, Choice)
        assert choice.token in (1, 2)


def test_a_token_that_the_grammar_refuses_is_an_error_in_words() -> None:
    grammars = Grammars((TOKENIZER / "tokenizer.json").read_text("utf-8"), 4096, [END])
    matcher = grammars.matcher(Constraint("schema", OBJECT, "response_format"))
    with pytest.raises(InvalidRequest) as refusal:
        matcher.take(600)
    assert not any(dump in refusal.value.message for dump in DUMPS)
    assert not bool(matcher.allowed().any())
    assert refusal.value.param == "response_format"
