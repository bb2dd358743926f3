from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from app.cli import main
from app.commands import job_options, jobs, terminal
from app.commands.option_groups import takes_groups
from app.core.errors import InvalidRequest


def body_of(model: str | None, spec: Path | None = None, **options: Any) -> dict[str, object]:
    return job_options.job_body(model, job_options.JobOptions(spec=spec, **options))


def test_only_flags_are_sent() -> None:
    body = body_of("org/name", method="awq", bits=None, dataset=None)
    assert body == {"model": "org/name", "recipe": {"method": "awq"}}


def test_options_change_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"model": "a/b", "recipe": {"bits": 4, "group_size": 64}}))
    body = body_of(None, file, bits=3)
    assert body == {"model": "a/b", "recipe": {"bits": 3, "group_size": 64}}


def test_the_file_may_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"model": "a/b"}'))
    assert body_of(None, Path("-")) == {"model": "a/b"}


def test_options_do_not_change_a_list_of_recipes(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"model": "a/b", "recipe": [{"bits": 4}, {"bits": 3}]}))
    with pytest.raises(typer.BadParameter, match="recipe"):
        body_of(None, file, bits=3)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_file_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(text)
    with pytest.raises(typer.BadParameter):
        body_of("a/b", file)


def test_a_model_is_needed() -> None:
    with pytest.raises(typer.BadParameter, match="model"):
        body_of(None)


def test_a_folder_becomes_a_file_reference(tmp_path: Path) -> None:
    assert job_options.model_reference(str(tmp_path)) == tmp_path.as_uri()
    assert job_options.model_reference("hf:org/name") == "hf:org/name"


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="there is no folder examples/typo"):
        job_options.model_reference("examples/typo")
    assert job_options.model_reference("org/name") == "org/name"


def test_options_fill_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"model": "a/b", "target": None}))
    body = body_of(None, file, max_ratio=1.01)
    assert body == {"model": "a/b", "target": {"max_perplexity_ratio": 1.01}}


def test_labels() -> None:
    assert job_options.split_labels(["team=search", "note=a=b"]) == {"team": "search", "note": "a=b"}
    assert job_options.split_labels(None) == {}
    with pytest.raises(typer.BadParameter, match="key=value"):
        job_options.split_labels(["team"])


def test_a_command_takes_the_options_of_a_job() -> None:
    @takes_groups
    def command(model: str, *, loud: bool = False, options: job_options.JobOptions) -> None:
        seen.append((model, loud, options))

    seen: list[tuple[str, bool, job_options.JobOptions]] = []
    app = typer.Typer()
    app.command()(command)
    CliRunner().invoke(app, ["a/b", "--loud", "--bits", "3", "--format", "awq", "--asymmetric"])
    assert seen == [("a/b", True, job_options.JobOptions(bits=3, formats=["awq"], symmetric=False))]


def test_limits_of_time_can_be_raised_where_a_job_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remedies of jobs that met them name these options."""
    sent: list[dict[str, Any]] = []

    @contextmanager
    def service(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(submit=lambda body, **_: sent.append(body))

    monkeypatch.setattr(terminal, "connect", service)
    monkeypatch.setattr(jobs, "show_job", lambda *_: None)
    monkeypatch.setattr(jobs, "show_next_steps", lambda *_: None)
    with pytest.raises(SystemExit):
        main(["submit", "a/b", "--timeout", "90", "--queue-timeout", "7"])
    assert sent == [{"model": "a/b", "timeout_s": 90, "queue_timeout_s": 7}]


def test_each_option_has_its_place_in_the_body() -> None:
    options = {field.name for field in fields(job_options.JobOptions)}
    assert options == {*job_options.PLACES, "adapter", "evaluated", "formats", "serve_on", "spec"}


def test_an_adapter_is_a_folder_or_a_reference(tmp_path: Path) -> None:
    for adapter, reference in (("hf:me/tuned", "hf:me/tuned"), (str(tmp_path), tmp_path.as_uri())):
        body = job_options.job_body("hf:a/b", job_options.JobOptions(adapter=adapter))
        assert body == {"model": "hf:a/b", "adapter": reference}
    with pytest.raises(InvalidRequest) as refusal:
        job_options.job_body("hf:a/b", job_options.JobOptions(adapter=str(tmp_path / "none")))
    assert refusal.value.param == "adapter"
    assert "save_pretrained" in refusal.value.remedy


def test_a_job_can_do_without_an_evaluation() -> None:
    options = job_options.JobOptions(method="rtn", evaluated=False)
    body = job_options.job_body("hf:a/b", options)
    assert body == {"model": "hf:a/b", "recipe": {"method": "rtn"}, "evaluation": None}
    with pytest.raises(typer.BadParameter, match="contradict"):
        job_options.job_body("hf:a/b", job_options.JobOptions(evaluated=False, eval_samples=4))


@pytest.mark.parametrize(("flag", "asked"), [("--all-experts", True), ("--routed-experts", False)])
def test_experts_can_be_calibrated_on_every_token(
    flag: str, monkeypatch: pytest.MonkeyPatch, *, asked: bool
) -> None:
    sent: list[dict[str, Any]] = []

    @contextmanager
    def service(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(submit=lambda body, **_: sent.append(body))

    monkeypatch.setattr(terminal, "connect", service)
    monkeypatch.setattr(jobs, "show_job", lambda *_: None)
    monkeypatch.setattr(jobs, "show_next_steps", lambda *_: None)
    with pytest.raises(SystemExit):
        main(["submit", "a/b", flag])
    assert sent == [{"model": "a/b", "calibration": {"all_experts": asked}}]


def test_a_key_that_occurs_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    spec = tmp_path / "job.json"
    spec.write_text('{"model": "a/b", "recipe": {"bits": 4, "bits": 8}}')
    with pytest.raises(typer.BadParameter, match="the key 'bits' occurs twice"):
        body_of(None, spec)
