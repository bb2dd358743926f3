"""How fast a job's result is served, from its servers' own metrics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from app.client import NibbleClient
from app.commands.served_speed import served_speed, tokens_per_s
from tests.unit.app.canned import Canned, canned_service, run

NOW = "2026-01-01T00:00:00Z"
METRICS = """# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{{le="0.1",model_name="m"}} 10.0
vllm:inter_token_latency_seconds_sum{{model_name="m"}} {sum}
vllm:inter_token_latency_seconds_count{{model_name="m"}} {count}
"""
JOB = {
    "id": "job_1", "state": "succeeded", "created_at": NOW, "artifacts": ["art_1", "art_2"],
    "spec": {"model": "a/b"},
}  # fmt: skip
CANDIDATE = {
    "recipe_index": 0,
    "label": "awq w4 g128",
    "bytes": {"awq": 5_000_000},
    "perplexity_ratio": 1.002,
}
REPORT = {
    "model": "a/b", "evaluation": {}, "original": {"bytes": 10_000_000}, "candidates": [CANDIDATE],
    "published": [0], "stages": {},
}  # fmt: skip


def deployment(
    name: str, artifact: str, *, original: bool = False, state: str = "ready"
) -> dict[str, object]:
    server = {"slot": 0, "worker": "w", "engine": "transformers", "state": state}
    return {
        "id": f"dep_{name}", "name": name, "artifact": artifact, "original": original, "engine": "auto",
        "state": state, "servers": [server], "created_at": NOW,
    }  # fmt: skip


@pytest.fixture
def service() -> Iterator[Canned]:
    with canned_service() as canned:
        canned.answers["GET /v1/jobs/job_1"] = (200, JOB)
        canned.answers["GET /v1/jobs/job_1/report"] = (200, REPORT)
        for artifact, label in (("art_1", "awq w4 g128"), ("art_2", "rtn w8")):
            manifest = {
                "id": artifact, "job": "job_1", "created_at": NOW, "model": "a/b", "recipe": {},
                "format": "awq", "size": 1, "files": [], "summary": {"label": label},
            }  # fmt: skip
            canned.answers[f"GET /v1/artifacts/{artifact}"] = (200, manifest)
        served = [
            deployment("other-job", "art_9"), deployment("other-recipe", "art_2"),
            deployment("still-loading", "art_1", state="loading"), deployment("fast", "art_1"),
            deployment("baseline", "art_1", original=True),
        ]  # fmt: skip
        canned.answers["GET /v1/deployments"] = (200, {"data": served})
        for name, total in (("other-job", 1.0), ("other-recipe", 2.0), ("fast", 2.5), ("baseline", 5.0)):
            route = f"GET /v1/deployments/dep_{name}/servers/0/metrics"
            canned.answers[route] = (200, METRICS.format(sum=total, count=100.0))
        yield canned


def test_the_speed_is_of_the_candidate_and_of_its_original(service: Canned) -> None:
    with NibbleClient(service.url) as client:
        assert served_speed(client, "job_1", "awq w4 g128") == (20.0, 40.0)


def test_a_report_ends_with_the_speed_once_it_is_served(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", "job_1", "--url", service.url) == 0
    assert "20.0 → 40.0 tokens per second (2.0×)" in capsys.readouterr().out


def test_without_the_right_to_read_deployments_the_report_is_there(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answers["GET /v1/deployments"] = (
        403,
        {"title": "Forbidden", "code": "scope_missing", "detail": "no"},
    )
    assert run("report", "job_1", "--url", service.url) == 0
    out = capsys.readouterr().out
    assert "2.0× smaller" in out
    assert "tokens per second" not in out


def test_before_the_first_answer_there_is_no_speed() -> None:
    assert tokens_per_s(METRICS.format(sum=0.0, count=0.0)) is None
    assert tokens_per_s("") is None
