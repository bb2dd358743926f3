"""The openai client against a deployment of a real artifact: gateway, worker, server, model."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.api_service import ADMIN_KEY, Service
from tests.integration.serving_floor import Floor
from tests.waiting import wait_until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
QUESTION: list[Any] = [{"role": "user", "content": "The history of the city"}]


@pytest.fixture
def floor(service: Service, small_artifact: Path) -> Iterator[Floor]:
    """A deployment `tiny` of the small artifact."""
    floor = Floor(service)
    files = {path.relative_to(small_artifact).as_posix(): path.read_bytes()
             for path in small_artifact.rglob("*") if path.is_file()}  # fmt: skip
    artifact = service.publish(service.submit()["id"], files)
    with floor.worker(real=True) as worker:
        deployment_id = floor.deploy("tiny", artifact.id)
        # Loading torch takes long where several tests share a core.
        wait_until(lambda: floor.view(deployment_id)["state"] == "ready", 120)
        wait_until(lambda: floor.client.get("/v1/models").json()["data"][0]["max_model_len"])
        yield floor
        worker.kill()
        worker.wait()
        wait_until(lambda: not floor.servers())  # none outlives the worker


def client_of(floor: Floor, **options: Any) -> openai.OpenAI:
    options = {"api_key": ADMIN_KEY, "max_retries": 0, "timeout": 120, **options}
    return openai.OpenAI(base_url=f"{floor.service.url}/v1", **options)


def test_the_openai_client_runs_the_contract(floor: Floor) -> None:
    with client_of(floor) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        whole = client.chat.completions.create(model="tiny", messages=QUESTION, **GREEDY)
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 6
        parts = list(
            client.chat.completions.create(
                model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
            )
        )
        said = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
        assert said == whole.choices[0].message.content
        reasons = [choice.finish_reason for part in parts for choice in part.choices if choice.finish_reason]
        assert reasons == [whole.choices[0].finish_reason]
        assert parts[-1].usage == whole.usage
        several = client.completions.create(model="tiny", prompt="The", n=2, seed=1, max_tokens=3)
        assert [choice.index for choice in several.choices] == [0, 1]
        with pytest.raises(openai.BadRequestError, match="256"):
            client.completions.create(model="tiny", prompt="word " * 2000, max_tokens=1)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="absent", prompt="x")
    with client_of(floor, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    check_bytes(floor)
    check_recovery(floor)


def check_bytes(floor: Floor) -> None:
    """The gateway's stream is the server's, byte for byte, but for what differs between any two answers."""
    body = {"model": "tiny", "messages": QUESTION, "stream": True, **GREEDY}
    live = floor.deployments.all()[0]
    own = floor.client.post("/v1/chat/completions", json=body)
    direct = httpx.post(f"{live.ready[0].url}/v1/chat/completions", json=body, timeout=60)
    varying = rb'"id": ?"[^"]*"|"created": ?\d+'
    assert re.sub(varying, b"", own.content) == re.sub(varying, b"", direct.content)
    assert own.headers["content-type"] == direct.headers["content-type"]
    assert own.content.endswith(b"\n\ndata: [DONE]\n\n")


def check_recovery(floor: Floor) -> None:
    """A killed server is told of amid the stream; the client's own retries then meet the new one."""
    live = floor.deployments.all()[0]
    long = {"model": "tiny", "messages": QUESTION, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    with client_of(floor) as client:
        stream = client.chat.completions.create(stream=True, **long)
        next(stream)
        for pid in floor.server_pids(live.id):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="ended before the answer was complete"):
            list(stream)
    with client_of(floor, max_retries=50) as patient:
        again = patient.chat.completions.create(model="tiny", messages=QUESTION, **GREEDY)
    assert again.choices[0].message.content is not None
