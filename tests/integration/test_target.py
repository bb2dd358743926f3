"""The quality target on the bundled model: met by the ladder, missed with a report, published as asked."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from pydantic import ByteSize

from app.core.child.assignment import REPORT, Noted, Stage, StageStarted
from app.core.errors import TargetMissed
from app.core.jobs.report import Report
from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe, SearchSpec, TargetSpec
from tests.tiny_models import EngineRun, assignment, tiny_model, tiny_spec
from workers.child.job_run import run_job

PLAIN = Recipe(method="rtn", bits=3, search=SearchSpec(budget=12))
QUICK = Recipe(group_size=32, bits=2, method="gptq", search=SearchSpec(clip=False))


def spec(target: TargetSpec, **changes: object) -> JobSpec:
    body = {
        "model": "bundled",
        "recipe": PLAIN,
        "calibration": CalibrationSpec(num_samples=8, sequence_length=128),
        "evaluation": EvaluationSpec(num_samples=4),
        "target": target,
    }
    return JobSpec.model_validate({**body, **changes})


def tiny_target(target: TargetSpec) -> JobSpec:
    return tiny_spec(QUICK, target=target)


def test_the_ladder_meets_a_target_that_the_recipe_misses(tmp_path: Path, example_model: Path) -> None:
    run = EngineRun(spec(TargetSpec(max_perplexity_ratio=1.015)), example_model, tmp_path)
    tries = run.report.tries
    assert (tries[0].rung, tries[0].meets_target) == ("as asked", False)
    assert tries[0].perplexity_ratio > 1.015
    assert len(tries) > 1
    assert tries[-1].meets_target
    assert tries[-1].perplexity_ratio <= 1.015
    assert [one.recipe_index for one in tries] == list(range(len(tries)))
    assert all(one.seconds > 0 and one.bytes and one.reason for one in tries)
    (output,) = run.finished.outputs
    assert output.recipe_index == tries[-1].recipe_index
    assert output.recipe == tries[-1].recipe
    assert run.report.published == (output.recipe_index,)
    assert output.summary["perplexity_ratio"] == tries[-1].perplexity_ratio
    stages = [message.stage for message in run.messages if isinstance(message, StageStarted)]
    searching = len(stages) - 1 - stages[::-1].index(Stage.SEARCHING)
    assert stages.index(Stage.EVALUATING) < searching
    assert Stage.CALIBRATING not in stages[stages.index(Stage.EVALUATING) :]  # no second pass


def test_bits_are_raised_until_the_target_is_met(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    run = EngineRun(tiny_target(TargetSpec(max_kl=0.002)), model, tmp_path / "work")
    last = run.report.tries[-1]
    assert last.rung.startswith("more bits")
    assert last.kl <= 0.002
    config = json.loads((run.folder("compressed-tensors", last.recipe_index) / "config.json").read_text())
    widths = {g["weights"]["num_bits"] for g in config["quantization_config"]["config_groups"].values()}
    bits = {linear.bits for layer in run.report.candidates[-1].layers for linear in layer.linears}
    assert widths == bits
    output = tmp_path / "work" / "output"
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == sorted(
        {f"{index}-compressed-tensors" for index in published_and_best_before(run.report)}
    )


def published_and_best_before(report: Report) -> set[int]:
    """What still lies on the disk: the published candidate, and the best of those before it."""
    before = report.tries[:-1]
    best = min(before, key=lambda one: one.kl)
    return {best.recipe_index, report.tries[-1].recipe_index}


def test_a_target_out_of_reach_fails_with_every_try_in_the_report(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    wanted = TargetSpec(max_perplexity_ratio=0.01, max_kl=1e-9)
    with pytest.raises(TargetMissed, match=r"at most 0\.01 times and a KL of at most 1e-09 was asked for"):
        run_job(assignment(tiny_target(wanted), model, tmp_path), lambda _: None)
    report = Report.model_validate_json((tmp_path / REPORT).read_text())
    assert report.published == ()
    assert len(report.tries) >= 3
    assert not any(one.meets_target for one in report.tries)
    assert {linear.bits for layer in report.candidates[-1].layers for linear in layer.linears} == {8}
    assert report.notes[-1] == "no rung of the ladder is left"


def test_on_miss_publish_gives_the_best_and_says_so(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    wanted = TargetSpec(max_kl=1e-9, on_miss="publish")
    recipe = Recipe(group_size=32, search=SearchSpec(budget=12))
    run = EngineRun(tiny_spec(recipe, target=wanted, formats=("awq",)), model, tmp_path / "work")
    kls = [one.kl for one in run.report.tries]
    (output,) = run.finished.outputs
    assert output.recipe_index == kls.index(min(kls))
    assert "it is published as asked" in run.report.notes[-1]
    assert any("awq holds" in note or "format awq" in note for note in run.report.notes)


def test_lost_statistics_are_made_anew_to_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    wanted = tiny_target(TargetSpec(max_kl=0.05))
    whole = EngineRun(wanted, model, tmp_path / "whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoints", resumed / "checkpoints")
    for index in range(1, len(whole.report.tries)):
        for file in (resumed / "checkpoints").glob(f"*-recipe-{index:02d}.safetensors"):
            file.unlink()
    again = EngineRun(wanted, model, resumed)
    codes = [message.code for message in again.messages if isinstance(message, Noted)]
    assert "statistics_lost" in codes
    assert [one.kl for one in again.report.tries] == [one.kl for one in whole.report.tries]
    name, index = "compressed-tensors", whole.finished.outputs[0].recipe_index
    files = [(run.folder(name, index) / "model.safetensors").read_bytes() for run in (whole, again)]
    assert files[0] == files[1]


def test_the_least_error_within_bytes_is_published(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    free = EngineRun(tiny_spec(QUICK), model, tmp_path / "free")
    limit = int(sum(free.report.candidates[0].bytes.values()) * 1.15)
    run = EngineRun(tiny_target(TargetSpec(max_size=ByteSize(limit))), model, tmp_path / "work")
    tries = run.report.tries
    assert len(tries) > 1
    assert all(one.meets_target and max(one.bytes.values()) <= limit for one in tries)
    best = min(tries, key=lambda one: one.kl)
    assert run.report.published == (best.recipe_index,)
    assert best.kl < tries[0].kl
    assert any("exceed target.max_size" in note or "bytes leave" in note for note in run.report.notes)


def test_bytes_that_do_not_reach_the_quality_fail_with_the_nearest(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    free = EngineRun(tiny_spec(QUICK), model, tmp_path / "free")
    limit = int(sum(free.report.candidates[0].bytes.values()) * 1.05)
    target = TargetSpec(max_kl=1e-9, max_size=ByteSize(limit))
    with pytest.raises(TargetMissed) as missed:
        EngineRun(tiny_target(target), model, tmp_path / "work")
    message = missed.value.message
    assert f"files of at most {limit} bytes was asked for" in message
    assert f"a KL of at most {target.max_kl}" in message
    (size,) = re.findall(r" in (\d+) bytes; ", message)
    assert int(size) <= limit
