"""The command line against a small HTTP server with canned answers: output, exit codes, which key is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.client import JobAnswer, NibbleClient
from tests.unit.app.canned import Canned, canned_service, run

JOB = {
    "id": "job_1", "state": "succeeded", "created_at": "2026-01-01T00:00:00Z",
    "spec": {"model": "a/[b]", "recipe": [{"bits": 3, "group_size": 128}, {}]},
    "progress": {"fraction": 1.0}, "artifacts": ["art_1"],
}  # fmt: skip
FAILED = {
    **JOB,
    "state": "failed",
    "artifacts": [],
    "error": {"code": "weights_bad", "message": "NaN", "remedy": "no"},
}


@pytest.fixture
def service() -> Iterator[Canned]:
    with canned_service() as canned:
        yield canned


def test_submit_prints_the_job_as_json(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    service.answers["POST /v1/jobs"] = (202, JOB)
    options = (
        "--method",
        "awq",
        "--bits",
        "4",
        "--group-size",
        "128",
        "--format",
        "awq",
        "--num-samples",
        "16",
        "--rounding",
        "gptq",
        "--max-perplexity-ratio",
        "1.01",
    )
    more = ("--format", "compressed-tensors", "--label", "team=search", "--json", "--url", service.url)
    assert run("submit", "a/b", *options, *more) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "job_1"
    assert json.loads(service.requests[0][2]) == {
        "model": "a/b",
        "recipe": {"method": "awq", "bits": 4, "group_size": 128, "rounding": "gptq"},
        "target": {"max_perplexity_ratio": 1.01},
        "calibration": {"num_samples": 16},
        "formats": ["awq", "compressed-tensors"],
        "labels": {"team": "search"},
    }


def test_watch_exits_with_0_for_success(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    service.answers["GET /v1/jobs/job_1"] = (200, JOB)
    assert run("watch", "job_1", "--url", service.url) == 0
    assert "artifact art_1" in capsys.readouterr().out


def test_watch_exits_with_1_for_a_failed_job(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    service.answers["GET /v1/jobs/job_1"] = (200, FAILED)
    assert run("watch", "job_1", "--url", service.url) == 1
    assert "NaN [weights_bad]" in capsys.readouterr().out


def test_watch_shows_device_notes_and_layers_as_they_come(
    service: Canned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = {
        **JOB, "state": "running", "stage": "searching", "worker": "here-1", "artifacts": [],
        "progress": {"fraction": 0.5, "layer": 1, "layers": 2},
    }  # fmt: skip

    def changes(client: NibbleClient, job: str) -> Iterator[JobAnswer]:
        yield JobAnswer.model_validate(running)
        yield JobAnswer.model_validate(JOB)

    events = [
        {"id": "1-0", "kind": "note", "payload": {"code": "prediction", "message": "9 s are expected"}},
        {"id": "2-0", "kind": "checkpoint", "payload": {"key": "layer-0", "layer": 0, "error": 0.0312}},
        {
            "id": "3-0",
            "kind": "note",
            "payload": {"code": "plan", "message": "down_proj keeps its precision"},
        },
    ]
    worker = {
        "name": "here-1", "host": "h", "device": "cpu", "device_name": "Xeon", "queue": "quantize",
        "state": "busy",
        "started_at": "2026-01-01T00:00:00Z", "heartbeat_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    monkeypatch.setattr(NibbleClient, "follow", changes)
    service.answers["GET /v1/jobs/job_1/events"] = (200, {"data": events, "has_more": False, "next": "3-0"})
    service.answers["GET /v1/workers"] = (200, {"data": [worker]})
    assert run("watch", "job_1", "--url", service.url) == 0
    out = capsys.readouterr().out
    assert "runs on Xeon (here-1)" in out
    assert "note: down_proj keeps its precision" in out
    assert "layer 0: error 0.031" in out
    assert "are expected" not in out


def test_watch_as_json_prints_a_line_for_each_change(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answers["GET /v1/jobs/job_1"] = (200, FAILED)
    assert run("watch", "job_1", "--json", "--url", service.url) == 1
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == ["failed"]


def test_ctrl_c_amid_watch_says_that_the_job_goes_on(
    service: Canned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(client: NibbleClient, job: str) -> Iterator[JobAnswer]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(NibbleClient, "follow", interrupted)
    assert run("watch", "job_1", "--url", service.url) == 130
    assert "nibble cancel job_1 stops it" in capsys.readouterr().err


def test_an_address_without_a_scheme_is_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("jobs", "--url", "localhost:8420") == 1
    assert "http://127.0.0.1:8420" in capsys.readouterr().err


def test_jobs_shows_brackets_of_a_name_as_they_are(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answers["GET /v1/jobs"] = (
        200,
        {"object": "list", "data": [JOB], "has_more": True, "next": "cursor"},
    )
    assert run("jobs", "--state", "succeeded", "--url", service.url) == 0
    out = capsys.readouterr().out
    assert "awq w3 g128 and 1 more  a/[b]" in out
    assert "more: nibble jobs --state succeeded --url" in out
    assert out.endswith("--after cursor\n")
    assert service.requests[0][0] == "GET /v1/jobs?state=succeeded&limit=20"


def test_a_refusal_prints_code_and_remedy(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cancel", "job_9", "--url", service.url) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["error no such thing [not_found]", "remedy look again"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("watch", "job_1"),
        ("jobs",),
        ("cancel", "job_1"),
        ("report", "job_1"),
        ("artifacts",),
        ("estimate", "a/b"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_a_service_the_exit_code_is_3(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--url", "http://127.0.0.1:9") == 3
    assert "nibble up" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("submit",), ("watch",), ("submit", "a/b", "--bits", "x"), ("nonsense",)]
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err


def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NIBBLE_PORT", "many")
    assert run("jobs") == 1
    assert "NIBBLE_PORT='many'" in capsys.readouterr().err


def test_the_kept_key_is_sent_to_this_machine(service: Canned, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "api-key").write_text("kept\n")
    run("artifacts", "--url", service.url)
    assert service.requests[0][1]["Authorization"] == "Bearer kept"


def test_the_kept_key_is_sent_nowhere_else(tmp_path: Path) -> None:
    from app.commands.terminal import connect

    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "api-key").write_text("kept\n")
    with connect("http://nibble.test", None) as client:
        assert "Authorization" not in client.http.headers


def test_artifacts_show_and_report(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = {
        "id": "art_1", "job": "job_1", "created_at": "2026-01-01T00:00:00Z", "model": "a/b", "format": "awq",
        "recipe": {"method": "rtn", "group_size": 128},
        "files": [{"path": "config.json", "size": 1200, "sha256": "ab" * 32}],
    }  # fmt: skip
    service.answers["GET /v1/artifacts/art_1"] = (200, artifact)
    service.answers["GET /v1/artifacts"] = (200, {"data": [artifact]})
    assert run("artifacts", "show", "art_1", "--url", service.url) == 0
    assert "1.2 kB" in capsys.readouterr().out
    assert run("artifacts", "--url", service.url) == 0
    assert "rtn w4 g128" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["jobs", "artifacts", "deployments", "workers"])
def test_an_empty_list_says_what_comes_next(
    command: str, service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answers[f"GET /v1/{command}"] = (200, {"data": [], "has_more": False})
    assert run(command, "--url", service.url) == 0
    assert capsys.readouterr().out.startswith("none: ")


def test_watch_prints_nothing_before_the_service_has_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("watch", "job_1", "--url", "http://127.0.0.1:9") == 3
    assert capsys.readouterr().out == ""


def test_watch_ends_with_what_was_won(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    interval = {"low": 0.99, "high": 1.01}
    candidate = {"label": "awq w4", "perplexity": 12.3, "perplexity_ratio": 1.002, "kl": 0.01,
                 "perplexity_ratio_interval": interval, "bytes": {"awq": 5_000_000}}  # fmt: skip
    report = {"original": {"perplexity": 12.28, "bytes": 10_000_000}, "candidates": [candidate]}
    service.answers["GET /v1/jobs/job_1"] = (200, JOB)
    service.answers["GET /v1/jobs/job_1/report"] = (200, report)
    assert run("watch", "job_1", "--url", service.url) == 0
    out = capsys.readouterr().out
    assert "10.0 MB → 5.0 MB (2.0× smaller)" in out
    assert "within the noise" in out
    assert "nibble deploy art_1 --name NAME" in out


def test_submit_says_what_comes_next(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    service.answers["POST /v1/jobs"] = (202, {**JOB, "state": "queued", "artifacts": []})
    options = ("--target-kl", "0.02", "--priority", "high", "--webhook", "https://a.example", "--deploy", "b")
    assert run("submit", "a/b", *options, "--timeout", "60", "--force", "--url", service.url) == 0
    out = capsys.readouterr().out
    assert all(f"nibble {command} job_1" in out for command in ("watch", "logs", "cancel"))
    assert json.loads(service.requests[0][2]) == {
        "model": "a/b", "target": {"max_kl": 0.02}, "priority": "high", "webhook": {"url": "https://a.example"},
        "deploy": {"name": "b"}, "timeout_s": 60, "force": True,
    }  # fmt: skip


def test_a_result_that_was_there_is_said_to_be(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    service.answers["POST /v1/jobs"] = (200, {**JOB, "reused_from": "job_0"})
    assert run("submit", "a/b", "--url", service.url) == 0
    assert "job_0 has this result already; --force computes it again" in capsys.readouterr().out


def test_retry_takes_more_time(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    service.answers["POST /v1/jobs/job_1/retry"] = (202, {**JOB, "state": "queued"})
    assert run("retry", "job_1", "--timeout", "90", "--force", "--url", service.url) == 0
    assert json.loads(service.requests[-1][2]) == {"timeout_s": 90, "force": True}
    assert "nibble watch job_1" in capsys.readouterr().out


def test_logs_are_events_in_words_with_what_the_process_wrote(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [
        {
            "id": "1-1",
            "kind": "state",
            "at": "2026-01-01T10:00:00Z",
            "payload": {"state": "queued", "attempt": 0},
        },
        {
            "id": "1-2",
            "kind": "stage",
            "at": "2026-01-01T10:00:05Z",
            "payload": {"stage": "searching", "attempt": 2},
        },
        {"id": "1-3", "kind": "note", "payload": {"code": "x", "message": "a note", "detail": {}}},
        {
            "id": "1-4",
            "kind": "failure",
            "payload": {"code": "child_crashed", "output": "the last [words]\n"},
        },
        {"id": "1-5", "kind": "unheard", "payload": {"a": 1, "b": {}, "c": None}},
    ]
    # The last page of events has a cursor, too: what happens later is read from there.
    page = {"data": events, "has_more": False, "next": "1-5"}
    service.answers["GET /v1/jobs/job_1/events"] = (200, page)
    assert run("logs", "job_1", "--url", service.url) == 0
    assert sum("/events" in line for line, _, _ in service.requests) == 1
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "10:00:00 queued", "10:00:05 searching, attempt 2", "a note", "its process failed [child_crashed]",
        "the last [words]", "a 1",
    ]  # fmt: skip


def test_an_error_of_an_inference_route_keeps_its_words(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"message": "the model 'nix' does not exist", "code": "model_not_found", "param": "model"}
    service.answers["GET /v1/models/nix"] = (404, {"error": error})
    assert run("chat", "nix", "hello", "--url", service.url) == 1
    assert "error the model 'nix' does not exist [model_not_found]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["logs", "events", "report"])
def test_notes_name_options(command: str, service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    note = "4 evaluation windows leave more noise: raise evaluation.num_samples to 8"
    event = {"id": "1-0", "kind": "note", "payload": {"code": "plan", "message": note}}
    service.answers["GET /v1/jobs/job_1/report"] = (200, {"model": "a/b", "notes": [note]})
    service.answers["GET /v1/jobs/job_1/events"] = (200, {"data": [event]})
    if command == "events":
        streamed = f"id: 1-0\nevent: note\ndata: {json.dumps(event)}\n\n"
        service.answers["GET /v1/jobs/job_1/events"] = (200, streamed)
        service.then["GET /v1/jobs/job_1/events"] = (204, None)
    assert run(command, "job_1", "--url", service.url) == 0
    assert "raise --eval-samples to 8" in capsys.readouterr().out
