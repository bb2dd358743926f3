"""The exact frames of event streams, read as bytes; errors and metrics as programs read them."""

from __future__ import annotations

import json
from typing import Any

from tests.integration.inference_process import NAME, InferenceProcess

CHAT = {
    "model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0,
    "ignore_eos": True, "stream": True,
}  # fmt: skip


def read(inference: InferenceProcess, path: str, body: dict[str, Any]) -> tuple[dict[str, str], bytes]:
    with inference.client() as client, client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        return dict(response.headers), b"".join(response.iter_raw())


def frames(content: bytes) -> list[str]:
    """The payloads; nothing but `data:` lines and blank lines may be there."""
    *events, rest = content.decode().split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def test_the_frames_of_a_chat_stream(inference: InferenceProcess) -> None:
    body = CHAT | {"stream_options": {"include_usage": True}}
    headers, content = read(inference, "/v1/chat/completions", body)
    assert headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in headers
    *chunks, done = frames(content)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    same = {key: parsed[0][key] for key in ("id", "object", "created", "model")}
    assert all({key: chunk[key] for key in same} == same for chunk in parsed)
    deltas = [chunk["choices"][0]["delta"] for chunk in parsed[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(delta.keys() == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed[:-1]] == [None] * (len(deltas) - 1) + [
        "length"
    ]
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in parsed[:-1])


def test_usage_in_every_chunk(inference: InferenceProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, content = read(inference, "/v1/chat/completions", CHAT | {"stream_options": options})
    counts = [json.loads(chunk)["usage"]["completion_tokens"] for chunk in frames(content)[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_the_frames_of_a_text_stream(inference: InferenceProcess) -> None:
    body = {"prompt": "The", "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True}
    *chunks, done = frames(read(inference, "/v1/completions", body)[1])
    parsed = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in parsed} == {"text_completion"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed][-1] == "length"
    assert all("usage" not in chunk for chunk in parsed)


def test_errors_have_openais_shape(inference: InferenceProcess) -> None:
    with inference.client() as client:
        answers = [
            client.post("/v1/chat/completions", content=b"{no json"),
            client.post("/v1/chat/completions", json={"model": NAME}),
            client.post("/v1/chat/completions", content=b"[" * 100_000),
            client.get("/v1/no-such-route"),
            client.get("/v1/completions"),
        ]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 404, 405]
    for answer in answers:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_metrics_have_vllms_names(inference: InferenceProcess) -> None:
    read(inference, "/v1/chat/completions", CHAT)
    with inference.client() as client:
        text = client.get("/metrics").text
    labels = f'{{engine="0",model_name="{NAME}"}}'
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values[f"vllm:num_requests_running{labels}"]) == 0
    assert float(values[f"vllm:num_requests_waiting{labels}"]) == 0
    assert 0 <= float(values[f"vllm:kv_cache_usage_perc{labels}"]) <= 1
    assert float(values[f"vllm:generation_tokens_total{labels}"]) >= 4
    assert float(values[f"vllm:prompt_tokens_total{labels}"]) > 0
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert float(values[f"vllm:{name}_count{labels}"]) > 0
    ended = f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{NAME}"}}'
    assert float(values[ended]) > 0
