"""Predicted memory is at or a little above what a job's process takes, whatever takes most of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.child.assignment import CHECKPOINTS, Finished
from app.core.child.job_child import JobChild
from app.core.jobs.report import Report
from tests.tiny_models import assignment, random_model, save_model, tiny_spec

ABOVE = 1.25  # the base is a round figure, and hosts differ: 1,226 and 1,239 MB were seen for one job
LARGE = {"vocab_size": 49_152, "hidden_size": 256, "intermediate_size": 512}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": ({}, {}),
    "large vocabulary, tied": ({**LARGE, "tie_word_embeddings": True}, {}),
    "large vocabulary, head of its own, two bytes": (
        {**LARGE, "hidden_size": 1024, "tie_word_embeddings": False, "dtype": torch.bfloat16},
        {},
    ),
    "own answers": (
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4},
        {"dataset": "self"},
    ),
    "long windows, wide layer": (
        {"hidden_size": 256, "intermediate_size": 2048},
        {"num_samples": 2, "sequence_length": 1024},
    ),
}


@pytest.mark.parametrize(("model", "text"), SHAPES.values(), ids=SHAPES)
def test_predicted_memory_is_at_or_above_the_fact(
    model: dict[str, Any], text: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(random_model("llama", **model), tmp_path / "model")
    spec = tiny_spec(
        calibration={"num_samples": 4, "sequence_length": 256, **text},
        evaluation={"num_samples": 2},
        recipe={"method": "rtn", "group_size": 32},
    )
    work = tmp_path / "work"
    (work / CHECKPOINTS).mkdir(parents=True)
    with JobChild(assignment(spec, folder, work, threads=1)) as child:
        messages = list(child.messages())
        assert isinstance(messages[-1], Finished), child.output_tail()
        report = Report.model_validate_json((work / messages[-1].report).read_text())
    assert report.prediction is not None
    ratio = report.prediction.ram_bytes / report.peak_rss_bytes
    assert 1.0 <= ratio <= ABOVE, (
        f"{ratio:.3f} of {report.peak_rss_bytes / 1e6:.0f} MB, {os.cpu_count()} CPUs"
    )
