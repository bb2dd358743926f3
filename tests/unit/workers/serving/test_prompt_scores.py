"""Log-probabilities of prompts: equal to transformers' in each way that a prompt is read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.inference import Served, greedy, prompts_of_text
from tests.tiny_models import random_model, save_model
from workers.serving.routes import create_app

TOLERANCE = 2e-4  # of a log-probability in float32, whose sums run in other orders
PROMPTS = [prompt for prompt in prompts_of_text(9) if len(prompt) > 1]
TOP = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("llama"), tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def judge(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def logprobs_by(judge: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """(tokens - 1, vocabulary)"""
    return judge(input_ids=torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("case", ["as usual", "in small pieces", "few logits", "read whole, few logits"])
def test_scores_equal_transformers(
    folder: Path, judge: PreTrainedModel, native: bool, max_tokens: int, case: str
) -> None:
    pieces = {"prefill_tokens": 7} if case == "in small pieces" else {}
    served = Served(folder, dtype=torch.float32, native=native, **pieces)
    batch = served.engine.batch
    if "few logits" in case:
        batch._logit_rows = 5
    if "whole" in case:
        batch._in_pieces = False
    requests = [{**greedy(prompt, max_tokens), "prompt_logprobs": TOP} for prompt in PROMPTS]
    answers = served.answers(requests)
    plain = served.generate([greedy(prompt, max(max_tokens, 1)) for prompt in PROMPTS])
    for prompt, deltas, tokens in zip(PROMPTS, answers, plain, strict=True):
        scores = deltas[0].prompt_scores
        assert scores is not None
        assert all(delta.prompt_scores is None for delta in deltas[1:])
        assert [score.token for score in scores] == prompt[1:]
        expected = logprobs_by(judge, prompt)
        for row, score in zip(expected, scores, strict=True):
            assert score.logprob == pytest.approx(float(row[score.token]), abs=TOLERANCE)
            assert [each.logprob for each in score.top] == pytest.approx(
                row.topk(TOP).values.tolist(), abs=TOLERANCE
            )
            ranked = float(row.sort(descending=True).values[score.rank - 1])
            assert ranked == pytest.approx(float(row[score.token]), abs=TOLERANCE)
        drawn = [choice.token for delta in deltas for choice in delta.choices]
        assert drawn == tokens[:max_tokens]  # scoring changes nothing else
        assert deltas[-1].finish_reason == "length"


def test_prompts_that_are_only_scored_share_passes_and_cache_nothing(folder: Path) -> None:
    served = Served(folder, native=False)
    passes: list[int] = []
    batch, model = served.engine.batch, served.engine.batch.model
    joined: list[int] = []
    forward, join = model.forward, batch.cache.join

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.append(len(options["input_ids"]))
        return forward(*arguments, **options)

    model.forward = counted  # type: ignore[method-assign]
    batch.cache.join = lambda *arguments: joined.append(1) or join(*arguments)  # type: ignore[method-assign,func-returns-value]
    served.answers([{**greedy(prompt, 1), "prompt_logprobs": 0} for prompt in PROMPTS])
    assert sum(passes) == len(PROMPTS)
    assert len(passes) < len(PROMPTS)
    assert not joined


def post(served: Served, path: str, *bodies: dict[str, Any]) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        served.served.bind(asyncio.get_running_loop())
        transport = httpx.ASGITransport(create_app(served.served))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return [await client.post(path, json=body) for body in bodies]

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return Served(folder, dtype=torch.float32)


def test_echo_with_logprobs_as_lm_eval_asks(served: Served, judge: PreTrainedModel) -> None:
    """Lists of tokens, one token more than the prompt, and the last entry is that one, whatever it is."""
    body = {"prompt": PROMPTS, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1}
    answer = post(served, "/v1/completions", body)[0].json()
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        expected = logprobs_by(judge, prompt)
        own = [float(row[token]) for row, token in zip(expected, prompt[1:], strict=True)]
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(own, abs=TOLERANCE)
        best = [max(top.values()) for top in logprobs["top_logprobs"][1:-1]]
        assert best == pytest.approx(expected.max(-1).values.tolist(), abs=TOLERANCE)
        assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    assert answer["usage"]["prompt_tokens"] == sum(map(len, PROMPTS))


def test_nothing_is_written_with_max_tokens_0(served: Served) -> None:
    body = {"prompt": PROMPTS[3], "max_tokens": 0, "logprobs": 0, "echo": True, "return_token_ids": True}
    whole, streamed = post(served, "/v1/completions", body, {**body, "stream": True})
    choice, usage = whole.json()["choices"][0], whole.json()["usage"]
    assert choice["text"] == served.tokenization.decode(PROMPTS[3])
    assert (choice["finish_reason"], usage["completion_tokens"]) == ("length", 0)
    assert len(choice["logprobs"]["tokens"]) == len(PROMPTS[3])
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPTS[3], [])
    assert f'"text_offset":{choice["logprobs"]["text_offset"]}'.replace(" ", "") in streamed.text


def test_prompt_logprobs_as_vllm_writes_them(served: Served, judge: PreTrainedModel) -> None:
    prompt = PROMPTS[2]
    names = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    body = {"prompt": prompt, "max_tokens": 2, "prompt_logprobs": 2, "temperature": 0, "logprobs": 1, **names}
    choice = post(served, "/v1/completions", body)[0].json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    expected = logprobs_by(judge, prompt)
    for token, entries, row in zip(prompt[1:], others, expected, strict=True):
        assert entries[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=TOLERANCE)
        assert entries[str(token)]["decoded_token"] == served.tokenization.token_text(token)
        assert sorted(entry["rank"] for entry in entries.values())[:2] == [1, 2]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


@pytest.mark.parametrize(
    ("options", "start", "end"),
    [
        ({"truncate_prompt_tokens": 3}, -3, None),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, 0, 3),
        ({"truncate_prompt_tokens": -1}, 0, None),
    ],
)
def test_prompts_are_truncated(served: Served, options: dict[str, Any], start: int, end: int | None) -> None:
    body = {"prompt": PROMPTS[5], "max_tokens": 0, "return_token_ids": True, **options}
    answer = post(served, "/v1/completions", body)[0].json()
    assert answer["choices"][0]["prompt_token_ids"] == PROMPTS[5][start:end]


def test_a_prompt_beyond_the_context_is_cut_to_what_fits(served: Served) -> None:
    tokens = (PROMPTS[-1] * 20)[:300]
    body = {"prompt": tokens, "max_tokens": 6, "truncate_prompt_tokens": -1, "ignore_eos": True}
    refused, answer = post(served, "/v1/completions", {**body, "truncate_prompt_tokens": None}, body)
    assert refused.status_code == 400
    assert answer.json()["usage"]["prompt_tokens"] == served.limits.max_model_len - 6


def test_prompt_logprobs_are_refused_in_a_stream(served: Served) -> None:
    answer = post(served, "/v1/completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True})[0]
    assert answer.status_code == 400
    assert "prompt_logprobs is only allowed when stream is false" in answer.json()["error"]["message"]


def test_alternatives_are_no_more_than_were_asked_for(served: Served) -> None:
    body = {"prompt": PROMPTS[2], "max_tokens": 0, "prompt_logprobs": 5, "logprobs": 1, "echo": True}
    choice = post(served, "/v1/completions", body)[0].json()["choices"][0]
    assert max(len(top) for top in choice["logprobs"]["top_logprobs"][1:]) <= 2
    assert max(len(entries) for entries in choice["prompt_logprobs"][1:]) >= 5
