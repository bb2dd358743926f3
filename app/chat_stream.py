"""Reads a streamed chat completion, and waits for a model that loads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from app.core.errors import NibbleError

MAX_WAIT_S = 900.0  # for a model that loads
SILENCE_S = 600.0

Chunk = dict[str, Any]
OnWait = Callable[[float], None]  # hears for how many seconds is waited


class InferenceRefused(NibbleError):
    """The service answered with an error in OpenAI's shape. `code` is the service's."""

    code = "inference_refused"


def chat_chunks(http: httpx.Client, body: Mapping[str, Any], on_wait: OnWait) -> Iterator[Chunk]:
    """The chunks of the answer. A model that loads is asked again when it says."""
    give_up = time.monotonic() + MAX_WAIT_S
    while True:
        timeout = httpx.Timeout(SILENCE_S, connect=5.0)
        with http.stream("POST", "/v1/chat/completions", json=dict(body), timeout=timeout) as answer:
            if answer.is_success:
                yield from chunks(answer)
                return
            answer.read()
            error = refused(answer)
            is_loading = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            seconds = float(answer.headers.get("retry-after", 0)) if is_loading else 0.0
        if seconds <= 0 or time.monotonic() + seconds > give_up:
            raise error
        on_wait(seconds)
        time.sleep(seconds)


def chunks(answer: httpx.Response) -> Iterator[Chunk]:
    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise described(chunk["error"])
        yield chunk


def refused(answer: httpx.Response) -> InferenceRefused:
    try:
        return described(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return InferenceRefused(f"HTTP status {answer.status_code}", code=f"http_{answer.status_code}")


def described(error: Mapping[str, Any]) -> InferenceRefused:
    code = error.get("code")
    return InferenceRefused(str(error.get("message")), code=str(code) if code is not None else None)
