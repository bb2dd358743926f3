"""The engine's own behaviour: a model that fails, a queue that is full, an end that is told."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from app.core.errors import QueueFull, Unavailable
from tests.inference import Served, greedy, sampled
from tests.tiny_models import random_model, save_model
from tests.waiting import until
from workers.serving.conversations import render
from workers.serving.http_server import listen, serve
from workers.serving.protocol import ChatRequest
from workers.serving.requests import Generation
from workers.serving.routes import create_app
from workers.texts.chat_template import ChatTemplate

BODY = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not quantized at all: the engine does not mind."""
    return save_model(random_model("llama"), tmp_path_factory.mktemp("model"))


def fail_after(served: Served, steps: int, error: Exception) -> None:
    """From then on the model raises."""
    forward, left = served.engine.batch.forward, [steps]

    def failing(*arguments: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return forward(*arguments)

    served.engine.batch.forward = failing  # type: ignore[method-assign]


async def ask(served: Served, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Requests through the routes, in this event loop."""
    served.served.bind(asyncio.get_running_loop())
    transport = httpx.ASGITransport(create_app(served.served))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        answers = [await client.post("/v1/completions", content=json.dumps(body)) for body in bodies]
        return [*answers, await client.get("/health")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_ends_streams_with_an_error_and_the_health(folder: Path) -> None:
    served = Served(folder, native=False)
    fail_after(served, 5, RuntimeError("a broken kernel"))
    streamed, refused, health = asyncio.run(ask(served, BODY | {"stream": True}, BODY))
    *frames, error, done, rest = streamed.text.split("\n\n")
    assert streamed.status_code == 200
    assert len(frames) > 0
    assert "a broken kernel" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert (done, rest) == ("data: [DONE]", "")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert health.status_code == 503


def test_a_failure_before_the_first_token_is_an_ordinary_error(folder: Path) -> None:
    served = Served(folder, native=False)
    fail_after(served, 0, RuntimeError("a broken kernel"))
    streamed, _ = asyncio.run(ask(served, BODY | {"stream": True}))
    assert streamed.status_code == 503
    assert streamed.json()["error"]["type"] == "service_unavailable_error"


def test_output_that_is_not_finite_fails_the_request_alone(folder: Path) -> None:
    served = Served(folder, native=False)
    forward = served.engine.batch.forward
    broken = iter([True, False])

    def overflowing(*arguments: Any) -> Tensor:
        logits = forward(*arguments)
        return torch.full_like(logits, torch.nan) if next(broken, False) else logits

    served.engine.batch.forward = overflowing  # type: ignore[method-assign]
    first, second, health = asyncio.run(ask(served, BODY, BODY))
    assert first.status_code == 500
    assert "not finite" in first.json()["error"]["message"]
    assert (second.status_code, health.status_code) == (200, 200)


def test_the_queue_is_bounded_and_a_drain_closes_it(folder: Path) -> None:
    served = Served(folder, max_sequences=1, max_waiting=1)
    pieces: list[Any] = []
    request = greedy([5, 6], 200)
    with served.engine._arrived:  # the engine takes none meanwhile
        refusals = [submitted(served, generation(request, number, pieces)) for number in range(3)]
    assert refusals == [None, "overloaded", "overloaded"]
    served.engine.drain()
    with pytest.raises(Unavailable, match="shutting down"):
        served.engine.submit(generation(request, 9, pieces))


def submitted(served: Served, request: Generation) -> str | None:
    """The code of the refusal, if it is refused."""
    try:
        served.engine.submit(request)
    except QueueFull as refusal:
        return refusal.code
    return None


def generation(request: dict[str, Any], number: int, pieces: list[Any]) -> Generation:
    return Generation(id=f"r{number}", deliver=pieces.append, **request)


def test_choices_of_one_prompt_differ_by_their_seed(folder: Path) -> None:
    served = Served(folder)
    pieces = served.answers([sampled([5, 6, 7], 8, seed=1) | {"n": 3}])[0]
    assert len(set(texts_of(pieces, 3))) == 3
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"] * 3


def test_more_choices_than_rows_come_in_turns(folder: Path) -> None:
    """As they would come together, and the prompt is counted once."""
    request = sampled([5, 6, 7], 6, seed=1) | {"n": 5}
    together, narrow = Served(folder), Served(folder, max_sequences=2)
    most = 0
    join = narrow.engine.batch.join

    def counted(prefill: Any) -> None:
        nonlocal most
        join(prefill)
        most = max(most, len(narrow.engine.batch.sequences))

    narrow.engine.batch.join = counted  # type: ignore[method-assign]
    texts = [texts_of(served.answers([request])[0], 5) for served in (together, narrow)]
    assert texts[0] == texts[1]
    assert most == 2
    assert b'vllm:prompt_tokens_total{engine="0",model_name="tiny"} 3.0' in narrow.metrics.text()


def texts_of(pieces: list[Any], count: int) -> list[str]:
    return ["".join(piece.text for piece in pieces if piece.index == index) for index in range(count)]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"stop_token_ids": [10**9, -1], "min_tokens": 5}, 200),
        ({"top_k": 10**400}, 400),
        ({"temperature": 1e-320}, 200),
        ({"repetition_penalty": 1e-300}, 200),
        ({"prompt": [[5]] * 100}, 400),
        ({"prompt": [None] * 200_000}, 400),
        ({"prompt": "\ud800"}, 400),
        ({"logit_bias": {str(token): None for token in range(2000)}}, 400),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_no_request_ends_the_engine(folder: Path, change: dict[str, Any], status: int) -> None:
    answer, after, health = asyncio.run(ask(Served(folder), BODY | change, BODY))
    assert answer.status_code == status, answer.text
    assert status == 200 or answer.json()["error"]["type"] == "invalid_request_error"
    assert (after.status_code, health.status_code) == (200, 200)


@asynccontextmanager
async def listening(served: Served, drain_s: float) -> AsyncIterator[httpx.AsyncClient]:
    """The server in this event loop, until it has ended by itself."""
    bound, ready = listen("127.0.0.1", 0), asyncio.Event()
    served.engine.start = lambda: None  # type: ignore[method-assign]  # it runs
    app = create_app(served.served)
    server = asyncio.create_task(serve(app, served.served, bound, drain_s, lambda _: ready.set()))
    await ready.wait()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client
    await asyncio.wait_for(server, 60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_engine_ends_the_server(folder: Path) -> None:
    """The worker starts another one; a server that only refuses would stay."""
    served = Served(folder, native=False)
    fail_after(served, 0, RuntimeError("a broken kernel"))

    async def run() -> int:
        async with listening(served, drain_s=60) as client:
            return (await client.post("/v1/completions", json=BODY)).status_code

    assert asyncio.run(run()) == 503
    assert served.engine.failure is not None


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(folder: Path) -> None:
    async def run() -> list[str]:
        body = BODY | {"max_tokens": 240, "stream": True}
        async with (
            listening(Served(folder), drain_s=0) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            signal.raise_signal(signal.SIGTERM)
            return [line.removeprefix("data: ") async for line in lines if line]

    frames = asyncio.run(run())
    assert frames[-1] == "[DONE]"
    assert json.loads(frames[-2])["error"]["message"].startswith("the server is shutting down")


def test_a_caller_that_goes_while_its_stream_waits_is_not_served(folder: Path) -> None:
    served = Served(folder, native=False, max_sequences=1)
    forward = served.engine.batch.forward

    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.01)
        return forward(*arguments)

    served.engine.batch.forward = slow  # type: ignore[method-assign]
    body = BODY | {"max_tokens": 240, "stream": True}

    async def waiting(count: int) -> None:
        await until(
            lambda: served.metrics.waiting._value.get() == count, failure=lambda: served.engine.failure
        )

    async def run() -> None:
        async with (
            listening(served, drain_s=0) as client,
            client.stream("POST", "/v1/completions", json=body) as running,
        ):
            lines = running.aiter_lines()  # kept: its end would end the stream
            await anext(lines)
            second = asyncio.create_task(client.post("/v1/completions", json=body))
            await waiting(1)
            second.cancel()
            await waiting(0)
            assert served.engine.batch.sequences, "it left while the first one ran"
            signal.raise_signal(signal.SIGTERM)

    asyncio.run(run())
    assert b'finished_reason="length"' not in served.metrics.text()


def test_logprobs_of_a_text_have_the_token_itself(folder: Path) -> None:
    body = BODY | {"logit_bias": {"600": 100}, "logprobs": 1, "max_tokens": 2}
    answer, _ = asyncio.run(ask(Served(folder), body))
    logprobs = answer.json()["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 2
        assert top[token] == logprob == min(top.values())


@pytest.mark.parametrize(("choice", "expected"), [(None, "visit|Hi|ask:"), ("none", "|Hi|ask:")])
def test_tools_reach_the_template_unless_none_may_be_called(choice: str | None, expected: str) -> None:
    source = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}|"
        "{{ messages[0].content }}|{% if add_generation_prompt %}ask:{% endif %}"
    )
    template = ChatTemplate(source, {})
    tool = {"type": "function", "function": {"name": "visit"}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "tool_choice": choice}
    assert render(template, ChatRequest.model_validate(body)) == expected
