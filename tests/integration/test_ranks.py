"""Two processes on one calibration pass: the sums of one, up to the order of additions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.core.specs import CalibrationSpec, EvaluationSpec, JobSpec
from tests.tiny_models import TEXTS, EngineRun, some_text, tiny_model, tiny_spec
from workers.statistics_store import LayerStatistics

SAMPLES, LENGTH = 40, 256  # more than one batch


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    text = (TEXTS / "valid.txt").read_text("utf-8")[:60000]
    calibration = CalibrationSpec(texts=(text,), num_samples=SAMPLES, sequence_length=LENGTH)
    evaluation = EvaluationSpec(texts=(some_text("test"),), num_samples=2)
    return tiny_spec(calibration=calibration, evaluation=evaluation, target={"max_kl": 10.0})


def statistics(run: EngineRun) -> list[LayerStatistics]:
    calibration, _ = run.pipeline.read_texts()
    store = run.pipeline.open_statistics(calibration)
    return [store.load(layer) for layer in range(run.pipeline.plan.num_layers)]


def test_two_processes_give_the_sums_of_one(spec: JobSpec, tmp_path: Path) -> None:
    """Documented tolerance: float32 sums of the same terms in another order."""
    model = tiny_model(tmp_path / "model")
    works = [tmp_path / "one", tmp_path / "two"]
    for work in works:
        work.mkdir()
    one = EngineRun(spec, model, works[0], threads=1)
    two = EngineRun(spec, model, works[1], threads=1, calibration_devices=["cpu"])
    assert len(one.pipeline.batches(one.pipeline.read_texts()[0])) == 2
    for alone, shared in zip(statistics(one), statistics(two), strict=True):
        for expected, found in zip(alone.groups, shared.groups, strict=True):
            assert found.num_tokens == expected.num_tokens == SAMPLES * LENGTH
            torch.testing.assert_close(found.abs_mean, expected.abs_mean, rtol=1e-5, atol=1e-7)
            scale = float(expected.second_moment.diagonal().mean())
            torch.testing.assert_close(
                found.second_moment, expected.second_moment, rtol=1e-4, atol=1e-5 * scale
            )
    ratios = [run.report.candidates[0].perplexity_ratio for run in (one, two)]
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-3)


def test_one_batch_needs_no_other_process(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    run = EngineRun(tiny_spec(), model, tmp_path, calibration_devices=["cpu", "cpu"])
    assert run.report.candidates[0].kl >= 0


def test_a_process_that_fails_ends_the_job_child() -> None:
    """Without its sums nothing can be finished, and waiting for them would last for ever."""
    program = (
        "import subprocess, sys, time\n"
        "from workers.ranks import end_with\n"
        "end_with(subprocess.Popen([sys.executable, '-c', 'raise SystemExit(3)']), 1)\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "calibration rank 1 ended with exit code 3" in ended.stderr
