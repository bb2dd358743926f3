"""Notes on degenerate texts, from tokens and from the original's perplexity, in the events and the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.core.child.assignment import Noted
from app.core.records.specs import CalibrationSpec, EvaluationSpec, Recipe
from tests.tiny_models import EngineRun, some_text, tiny_model, tiny_spec
from workers.child.text_checks import left_out_notes, perplexity_note, repetition_notes
from workers.texts.windows import Windows


@pytest.mark.parametrize(
    ("perplexity", "words"),
    [
        (1.0, "nearly every token follows"),
        (1.3, "nearly every token follows"),
        (1.6, None),
        (25.0, None),
        (49_151.0, None),
        (49_152.0, "guessing each token alike"),
        (float("inf"), "guessing each token alike"),
    ],
)
def test_perplexities_of_the_original(perplexity: float, words: str | None) -> None:
    note = perplexity_note(perplexity, 49_152)
    assert note is None if words is None else note is not None and words in note


def test_windows_that_repeat() -> None:
    random = torch.randint(1000, (20, 64), generator=torch.Generator().manual_seed(0))
    usual, other = Windows(random, 20), Windows(random + 1000, 20)
    assert list(repetition_notes(usual, other)) == []
    same = Windows(random[:1].expand(20, 64), 20)
    assert [note.partition(":")[0] for note in repetition_notes(usual, same)] == [
        "the evaluation text repeats itself",
        "the recipes are calibrated on evaluation text",
    ]
    one_token = Windows(torch.full((20, 64), 7), 20)
    assert [note.partition(":")[0] for note in repetition_notes(one_token, other)] == [
        "the calibration text repeats itself"
    ]


def test_a_run_on_little_text_says_so(tmp_path: Path) -> None:
    """And each recipe has its own figures, on windows of a length that calibration need not have."""
    recipes = (Recipe(method="rtn", bits=8, group_size=32), Recipe(method="rtn", bits=2, group_size=32))
    text = some_text("valid")
    spec = tiny_spec(
        recipes,
        calibration=CalibrationSpec(texts=(text,), num_samples=40, sequence_length=32),
        evaluation=EvaluationSpec(texts=(text,), num_samples=6, sequence_length=48),
    )
    run = EngineRun(spec, tiny_model(tmp_path / "model"), tmp_path / "work")
    report = run.report
    assert report.evaluation["sequence_length"] == 48
    assert report.calibration["sequence_length"] == 32
    said = {(note.code, note.message) for note in run.messages if isinstance(note, Noted)}
    for code, start in (
        ("plan", "6 evaluation windows of 48 tokens leave more noise"),
        ("text", "the recipes are calibrated on evaluation text"),
    ):
        (note,) = [note for note in report.notes if note.startswith(start)]
        assert (code, note) in said
    eight, two = report.candidates
    assert eight.perplexity_ratio_interval is not None
    assert two.perplexity_ratio_interval is not None
    assert eight.perplexity_ratio_interval.standard_error < two.perplexity_ratio_interval.standard_error
    assert eight.kl_p99 is not None
    assert two.kl_p99 is not None
    assert eight.kl < eight.kl_p99 < two.kl_p99
    assert eight.top1_agreement is not None
    assert two.top1_agreement is not None
    assert two.top1_agreement < eight.top1_agreement <= 1
    summaries = [output.summary for output in run.finished.outputs]
    assert [each["kl_p99"] for each in summaries] == [eight.kl_p99, two.kl_p99]
    again = EngineRun(spec, tmp_path / "model", tmp_path / "work").report
    assert again.resumed_at_layer > 0
    for before, after in zip(report.candidates, again.candidates, strict=True):
        assert after.model_dump(exclude={"seconds", "layers"}) == before.model_dump(
            exclude={"seconds", "layers"}
        )


def test_what_was_left_out_of_conversations_is_counted() -> None:
    whole = Windows(torch.zeros(1, 4), 1)
    cut = Windows(torch.zeros(1, 4), 1, left_out=3)
    assert list(left_out_notes(whole, whole)) == []
    (note,) = left_out_notes(cut, whole)
    assert "3 images, sounds or videos of the calibration text" in note
    (note,) = left_out_notes(whole, cut)
    assert "of the evaluation text" in note
