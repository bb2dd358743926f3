"""The inference server's process: what it reports, and its routes."""

from __future__ import annotations

from tests.integration.inference_process import NAME, InferenceProcess


def test_it_reports_loading_and_then_readiness(inference: InferenceProcess) -> None:
    loading, ready = inference.messages
    assert loading["kind"] == "loading"
    assert ready["kind"] == "ready"
    assert sum(ready["kernels"].values()) == 14  # linears: seven in each of two layers
    assert all("4 bits, groups of 32, symmetric: " in kernel for kernel in ready["kernels"])
    assert ready["packed_bytes"] > 0
    assert ready["max_model_len"] == 256


def test_it_lists_its_model_and_is_healthy(inference: InferenceProcess) -> None:
    with inference.client() as client:
        listed = client.get("/v1/models").json()
        assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [(NAME, 256)]
        health = client.get("/health")
        assert (health.status_code, health.content) == (200, b"")
        assert set(client.get("/version").json()) == {"version"}


def test_a_completion(inference: InferenceProcess) -> None:
    body = {"model": NAME, "prompt": "The city of", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    with inference.client() as client:
        answers = [client.post("/v1/completions", json=body).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["completion_tokens"] == 5
    assert answers[0]["choices"][0]["finish_reason"] == "length"
