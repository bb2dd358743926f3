"""Follows jobs, their events, deployments and streamed answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from pydantic import ValidationError

from app.client.effects import Call, Emit, Flow, Open, Pause, Read, ReadAll, Stream
from app.client.errors import (
    WaitTimedOut,
    foreign,
    inference_error,
    inference_refusal,
    retry_after,
    unreachable,
)
from app.client.exchange import Exchange, parse
from app.client.paths import artifact_route, deployment_route, job_route
from app.client.server_sent import Messages
from app.client.views import DeploymentAnswer, EventAnswer, JobAnswer, PushAnswer
from app.core.errors import NotFound

LONG_POLL_S = 20.0
PATIENCE_S = 30.0  # how long a restarting service is waited for
POLL_S = 0.5
SILENCE_S = 60.0  # event streams send heartbeats more often than this
ANSWER_SILENCE_S = 600.0  # longest silence of a streamed answer
LOAD_LIMIT_S = 900.0  # longest wait for a loading model

Chunk = dict[str, Any]
OnWait = Callable[[float], None]  # called with the seconds of each wait


def ignore_seconds(seconds: float) -> None:
    """The default `on_wait`: does nothing."""


def job_changes(exchange: Exchange, job_id: str) -> Stream[JobAnswer]:
    """Yield the job now and after each change until it has ended, through restarts of the service."""
    etag: str | None = None
    while True:
        job, etag = yield from next_change(exchange, job_id, etag, LONG_POLL_S)
        if job is not None:
            yield Emit(job)
            if job.is_terminal:
                return


def ended_job(exchange: Exchange, job_id: str, *, timeout_s: float | None) -> Flow[JobAnswer]:
    """Return the job once it has ended. Raises WaitTimedOut."""
    give_up = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
    state, etag = "", None
    while True:
        left_s = max(0.0, give_up - time.monotonic())
        job, etag = yield from next_change(exchange, job_id, etag, min(left_s, LONG_POLL_S))
        if job is not None and job.is_terminal:
            return job
        state = job.state if job is not None else state
        if time.monotonic() >= give_up:
            raise WaitTimedOut(
                f"job {job_id} is {state} after {timeout_s:g} s", remedy="wait longer: the job goes on"
            )


def next_change(
    exchange: Exchange, job_id: str, etag: str | None, wait_s: float
) -> Flow[tuple[JobAnswer | None, str | None]]:
    """Return the job and its tag once it differs from `etag` (at once if None), else no job."""
    # The service waits in whole seconds; shorter waits happen here.
    headers = {"Prefer": f"wait={int(wait_s)}", "If-None-Match": etag} if etag else {}
    if etag and wait_s < 1:
        yield Pause(wait_s)
    call = Call("GET", job_route(job_id), headers=headers)
    answer = yield from exchange.sent(call, patience_s=PATIENCE_S if etag else 0.0)
    if answer.status_code == httpx.codes.NOT_MODIFIED:
        return None, etag
    return parse(JobAnswer, answer), answer.headers.get("ETag")


def job_events(exchange: Exchange, job_id: str, after: str | None) -> Stream[EventAnswer]:
    """Yield each event once, as it happens, until the job has ended."""
    heard_at: float | None = None
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after else {})}
        call = Call("GET", job_route(job_id, "events"), headers=headers, read_timeout_s=SILENCE_S)
        patience_s = PATIENCE_S if heard_at is not None else 0.0
        answer = yield from exchange.opened(Open(call), patience_s=patience_s)
        if answer.status_code == httpx.codes.NO_CONTENT:
            return
        messages = Messages()
        try:
            while (chunk := (yield Read())) is not None:
                heard_at = time.monotonic()
                for message in messages.feed(chunk):
                    after = message.id or after
                    yield Emit(event_of(message.data, answer))
        except httpx.TransportError as fault:
            if heard_at is None or time.monotonic() - heard_at > PATIENCE_S + SILENCE_S:
                raise unreachable(exchange.url, fault) from fault
        yield Pause(exchange.retries.pause_s(1, None))


def event_of(data: str, answer: httpx.Response) -> EventAnswer:
    try:
        return EventAnswer.model_validate_json(data)
    except ValidationError as fault:
        raise foreign(answer) from fault


def deployment_changes(exchange: Exchange, deployment_id: str) -> Stream[DeploymentAnswer]:
    """Yield the deployment now and after each change, without end."""
    seen: DeploymentAnswer | None = None
    while True:
        now = yield from exchange.read(DeploymentAnswer, Call("GET", deployment_route(deployment_id)))
        if now != seen:
            seen = now
            yield Emit(now)
        yield Pause(POLL_S)


def deployment_gone(exchange: Exchange, deployment_id: str) -> Flow[None]:
    """Return once a deleted deployment has finished its requests and is gone."""
    try:
        while True:
            yield from exchange.read(DeploymentAnswer, Call("GET", deployment_route(deployment_id)))
            yield Pause(POLL_S)
    except NotFound:
        return


def push_changes(exchange: Exchange, artifact_id: str, push_id: str) -> Stream[PushAnswer]:
    """Yield the push now and after each change until it has ended, through restarts of the service."""
    call = Call("GET", artifact_route(artifact_id, "pushes", push_id))
    seen: PushAnswer | None = None
    while seen is None or not seen.has_ended:
        if seen is not None:
            yield Pause(POLL_S)
        now = parse(PushAnswer, (yield from exchange.sent(call, patience_s=PATIENCE_S if seen else 0.0)))
        if now != seen:
            yield Emit(now)
        seen = now


def chat_chunks(exchange: Exchange, body: Mapping[str, Any], on_wait: OnWait) -> Stream[Chunk]:
    """Yield the chunks of a streamed answer; a loading model is retried after its Retry-After."""
    call = Call(
        "POST", "/v1/chat/completions", json={**body, "stream": True}, read_timeout_s=ANSWER_SILENCE_S
    )
    give_up = time.monotonic() + LOAD_LIMIT_S
    try:
        while True:
            answer: httpx.Response = yield Open(call)
            if answer.is_success:
                break
            yield ReadAll()
            is_loading = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            pause_s = (retry_after(answer) or 0) if is_loading else 0
            if pause_s <= 0 or time.monotonic() + pause_s > give_up:
                raise inference_refusal(answer)
            on_wait(pause_s)
            yield Pause(pause_s)
        messages = Messages()
        while (chunk := (yield Read())) is not None:
            for message in messages.feed(chunk):
                if message.data != "[DONE]":
                    yield Emit(chunk_of(message.data))
    except httpx.TransportError as fault:
        raise unreachable(exchange.url, fault) from fault


def chunk_of(data: str) -> Chunk:
    chunk: Chunk = json.loads(data)
    if "error" in chunk:
        raise inference_error(chunk["error"])
    return chunk
