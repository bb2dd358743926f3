from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from app.commands.comparison import Row, best_values, marked
from tests.unit.app.canned import Canned, canned_service, run

FIRST, SECOND = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV", "job_01ARZ3NDEKTSV4RRFFQ69G5FAW"
NOISE = {"low": 0.9934, "high": 1.0092}
BEYOND = {"low": 1.0120, "high": 1.0280}


def job(whole: str) -> dict[str, object]:
    return {
        "id": whole, "state": "succeeded", "created_at": "2026-01-01T00:00:00Z", "spec": {"model": "a/b"},
        "artifacts": [f"art_{whole[4:]}"],
    }  # fmt: skip


def artifact(whole: str, **summary: object) -> dict[str, object]:
    return {
        "id": f"art_{whole[4:]}", "job": whole, "created_at": "2026-01-01T00:00:00Z", "model": "a/b",
        "format": "awq", "summary": summary, "files": [{"path": "a", "size": 9, "sha256": "0"}],
    }  # fmt: skip


@pytest.fixture
def service() -> Iterator[Canned]:
    report = {"original": {"perplexity": 41.51, "bytes": 11_500_000}}
    four = {"label": "awq w4 g64", "bytes": 4_600_000, "perplexity": 41.56, "perplexity_ratio": 1.0012,
            "perplexity_ratio_interval": NOISE, "beyond_noise": False, "kl": 0.0045,
            "top1_agreement": 0.951}  # fmt: skip
    three = {"label": "rtn w3 g64", "bytes": 3_800_000, "perplexity": 42.34, "perplexity_ratio": 1.02,
             "perplexity_ratio_interval": BEYOND, "beyond_noise": True, "kl": 0.0312,
             "top1_agreement": 0.87}  # fmt: skip
    answers: dict[str, tuple[int, object]] = {}
    for whole, summary in ((FIRST, four), (SECOND, three)):
        answers[f"GET /v1/jobs/{whole}"] = (200, job(whole))
        answers[f"GET /v1/jobs/{whole}/report"] = (200, report)
        answers[f"GET /v1/artifacts/art_{whole[4:]}"] = (200, artifact(whole, **summary))
    answers["GET /v1/jobs"] = (200, {"data": [job(SECOND), job(FIRST)]})
    with canned_service(answers) as canned:
        yield canned


def test_jobs_stand_below_the_original_that_they_share(
    service: Canned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("compare", "last", FIRST, f"art_{FIRST[4:]}", "--url", service.url) == 0
    _, original, *results = capsys.readouterr().out.splitlines()
    assert original.split() == ["original", "11.5", "MB", "41.51"]
    assert [line.split("  ")[0] for line in results] == ["rtn w3 g64", "awq w4 g64"]
    assert "3.8 MB (3.0×)" in results[0]
    assert "+2.00 ± 0.80 %  " in results[0]
    assert "noise" not in results[0]
    assert "+0.12 ± 0.79 % noise" in results[1]
    assert max(map(len, (original, *results))) <= 80


def test_the_rows_as_json(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", FIRST, "--json", "--url", service.url) == 0
    original, row = json.loads(capsys.readouterr().out)["rows"]
    assert (original["label"], original["perplexity"], original["artifact"]) == ("original", 41.51, None)
    assert (row["bytes"], row["original_bytes"], row["beyond_noise"]) == (4_600_000, 11_500_000, False)


def test_an_artifact_outlives_its_job(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    del service.answers[f"GET /v1/jobs/{FIRST}/report"]
    assert run("compare", f"art_{FIRST[4:]}", "--url", service.url) == 0
    assert "4.6 MB  " in capsys.readouterr().out


def test_a_job_without_a_result_is_refused(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "out_of_memory", "message": "no memory", "remedy": "lower calibration.num_samples"}
    service.answers[f"GET /v1/jobs/{FIRST}"] = (200, {**job(FIRST), "state": "failed", "error": error})
    assert run("compare", FIRST, "--url", service.url) == 1
    assert "remedy lower --num-samples" in capsys.readouterr().err


def test_only_figures_that_differ_are_marked() -> None:
    row: Row = {"model": "a", "label": "x", "artifact": "art_1", "bytes": 5, "kl": 0.1, "perplexity": 2.0}
    better = {**row, "label": "y", "artifact": "art_2", "kl": 0.05}
    best = best_values([row, better])
    assert best == {"kl": 0.05}
    assert marked(better, "kl", best, "0.0500") == "[bold]0.0500[/]"
    assert marked(row, "kl", best, "0.1000") == "0.1000"
    assert marked(row, "bytes", best, "5 B") == "5 B"


@pytest.mark.parametrize(
    ("state", "remedy"),
    [("queued", "nibble watch"), ("running", "nibble watch"), ("cancelling", "nibble watch"),
     ("cancelled", "nibble retry")],
)  # fmt: skip
def test_a_job_without_a_result_is_named_once(
    state: str, remedy: str, service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answers[f"GET /v1/jobs/{FIRST}"] = (200, {**job(FIRST), "state": state, "artifacts": []})
    assert run("compare", FIRST, SECOND, "--url", service.url) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error {FIRST} is {state} [job_{state}]"
    assert f"`{remedy} {FIRST}`" in second


def test_artifacts_that_were_deleted_are_left_out(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, gone = f"art_{FIRST[4:]}", f"art_{SECOND[4:]}"
    service.answers[f"GET /v1/jobs/{FIRST}"] = (200, {**job(FIRST), "artifacts": [gone, kept]})
    del service.answers[f"GET /v1/artifacts/{gone}"]
    assert run("compare", FIRST, "--url", service.url) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    del service.answers[f"GET /v1/artifacts/{kept}"]
    assert run("compare", FIRST, "--url", service.url) == 1
    assert f"`nibble report {FIRST}`" in capsys.readouterr().err


def test_recipes_and_formats_of_a_job_have_names_of_their_own(
    service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ["art_1", "art_2", "art_3"]
    forms = [("awq w4 g64", "awq"), ("awq w4 g64", "compressed-tensors"), ("rtn w3 g64", "awq")]
    for whole, (label, form) in zip(ids, forms, strict=True):
        answer = {**artifact(FIRST, label=label, bytes=5), "id": whole, "format": form}
        service.answers[f"GET /v1/artifacts/{whole}"] = (200, answer)
    service.answers[f"GET /v1/jobs/{FIRST}"] = (200, {**job(FIRST), "artifacts": ids})
    assert run("compare", FIRST, "--url", service.url) == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["original", "awq w4 g64 (awq)", "awq w4 g64 (compressed-tensors)", "rtn w3 g64"]
