"""Steps over memory that stays, replayed as a graph would: the answers are those of the growing cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inference import Served, greedy, prompts_of_text, sampled
from tests.tiny_models import random_model, save_model
from workers.discovery.random_weights import tiny_model
from workers.serving.requests import Sampling
from workers.serving.slot_batch import SlotBatch, runner_of
from workers.serving.slot_cache import SlotLayer
from workers.serving.steps import EagerSteps, StepRunner, TracedSteps

NEW_TOKENS = 24
# Recurrences, windows, chunks, towers, learned positions; experts that the host reads run launch by launch.
FAMILIES = ("qwen3_5", "lfm2", "jamba", "gemma3", "gemma4", "mamba2", "opt", "mistral", "deepseek_v3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return served(folder, None).generate(requests())


def served(folder: Path, runner: StepRunner | None, **limits: int) -> Served:
    return Served(folder, dtype=torch.float32, native=False, slots=runner, **limits)


def requests(count: int = 20) -> list[dict[str, Any]]:
    return [greedy(prompt, NEW_TOKENS) for prompt in prompts_of_text(count)]


@pytest.mark.parametrize("runner", [EagerSteps, TracedSteps])
@pytest.mark.parametrize(
    "limits",
    [{}, {"prefill_tokens": 7}, {"max_sequences": 3}, {"max_cells": 300}],
    ids=["together", "prompts in pieces", "few rows", "a cache that overflows"],
)
def test_answers_are_those_of_the_growing_cache(
    folder: Path, expected: list[list[int]], runner: type[StepRunner], limits: dict[str, int]
) -> None:
    server = served(folder, runner(), **limits)
    assert server.generate(requests()) == expected
    assert server.preemptions > 0 if "max_cells" in limits else server.preemptions == 0


@torch.inference_mode()
def test_logits_are_those_of_the_growing_cache(folder: Path) -> None:
    """Of the whole vocabulary, within what float32 rounds; and one trace serves the steps of its sizes."""
    runner = TracedSteps()
    found = [logits_of(served(folder, each)) for each in (None, runner)]
    assert len(found[0]) == len(found[1]) > NEW_TOKENS
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(runner.traces) < 6


def logits_of(server: Served) -> list[Tensor]:
    """Those of each step of a few requests that start together."""
    logits: list[Tensor] = []
    advance = server.engine.batch.advance

    def noted() -> Tensor:
        logits.append(advance().clone())
        return logits[-1]

    server.engine.batch.advance = noted  # type: ignore[method-assign]
    server.engine.batch.draw_ahead = lambda _logits: None  # type: ignore[method-assign]
    server.generate([greedy(prompt, 30) for prompt in prompts_of_text(3)])
    return logits


def with_host_numbers(layer: SlotLayer, keys: Tensor, values: Tensor, *_a: Any, **_b: Any) -> Any:
    """Writes where Python says, as a cache that is not static does."""
    rows, end = layer.inputs.rows, layer.window.end
    layer.keys[:rows, :, end], layer.values[:rows, :, end] = keys[:, :, 0], values[:, :, 0]
    return layer.keys[:rows], layer.values[:rows]


def with_a_question(layer: SlotLayer, keys: Tensor, values: Tensor, *_a: Any, **_b: Any) -> Any:
    """Asks the device for a number."""
    layer.keys[: layer.inputs.rows, :, layer.inputs.end.item()] = keys[:, :, 0]
    return layer.keys[: layer.inputs.rows], layer.values[: layer.inputs.rows]


def test_the_stand_in_freezes_what_a_graph_freezes(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would prove nothing: what Python counts is right when run, not replayed."""
    monkeypatch.setattr(SlotLayer, "update", with_host_numbers)
    assert served(folder, EagerSteps()).generate(requests()) == expected
    assert served(folder, TracedSteps()).generate(requests()) != expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_stand_in_refuses_a_question_to_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotLayer, "update", with_a_question)
    server = served(folder, TracedSteps())
    answer = server.answers([greedy([5, 6], 4)])[0]
    assert answer[-1].finish_reason == "error"
    assert "tracing tensor" in str(server.engine.failure)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_kind_of_layer_is_replayed(model_type: str, tmp_path: Path) -> None:
    with torch.no_grad():
        model = tiny_model({"model_type": model_type})
    folder = save_model(model, tmp_path)
    asked = [greedy(prompt[: 26 + row], 10) for row, prompt in enumerate(prompts_of_text(6)) if prompt]
    answers = [
        Served(folder, dtype=torch.float32, native=False, prefill_tokens=17, slots=each).generate(asked)
        for each in (None, TracedSteps())
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_that_the_host_reads_run_launch_by_launch(model_type: str, tmp_path: Path) -> None:
    with torch.no_grad():
        model = tiny_model({"model_type": model_type})
    plain = Served(save_model(model, tmp_path), dtype=torch.float32, native=False)
    runner = runner_of(plain.loaded.model, "graphs")
    assert isinstance(runner, EagerSteps)
    assert runner.note == "the host reads which experts have tokens"
    asked = [greedy(prompt, 10) for prompt in prompts_of_text(4)]
    assert served(tmp_path, runner).generate(asked) == plain.generate(asked)


def mixed_requests() -> list[dict[str, Any]]:
    """Rows whose tokens the device draws beside rows whose rules the host must follow."""
    settings = (
        {"temperature": 0.9, "seed": 3}, {"temperature": 0.7, "top_k": 5, "seed": 4}, {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.5}, {"temperature": 1.0, "top_p": 0.8, "seed": 5},
        {"temperature": 0, "top_logprobs": 3}, {"temperature": 0, "logit_bias": {7: 4.0}},
    )  # fmt: skip
    pairs = zip(prompts_of_text(len(settings)), settings, strict=True)
    return [
        greedy(prompt, 6 + 5 * row, min_tokens=3) | {"sampling": Sampling(**setting)}
        for row, (prompt, setting) in enumerate(pairs)
    ]


@pytest.mark.parametrize("max_sequences", [32, 3])
def test_rules_hold_beside_tokens_drawn_ahead(folder: Path, max_sequences: int) -> None:
    plain, ahead = (served(folder, each, max_sequences=max_sequences) for each in (None, TracedSteps()))
    found = [
        [[piece.choices for piece in pieces] for pieces in each.answers(mixed_requests())]
        for each in (plain, ahead)
    ]
    tokens = [[[choice.token for choices in row for choice in choices] for row in rows] for rows in found]
    assert tokens[0] == tokens[1]
    logprobs = [[choice.logprob for choices in rows[5] for choice in choices] for rows in found]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)


def test_the_next_step_starts_before_the_host_has_seen_the_tokens(folder: Path) -> None:
    """Greedy rows: each step but the last ones is launched while the tokens before are on their way."""
    server = served(folder, TracedSteps())
    events: list[str] = []
    note(server.engine.batch, "advance", lambda: events.append("step"))
    note(server.engine, "_extend", lambda: events.append("tokens"))
    server.generate([greedy([5, 6, 7], 8)])
    assert events == ["tokens", "step", *["step", "tokens"] * 6, "tokens"]


def note(owner: Any, name: str, noted: Callable[[], None]) -> None:
    method = getattr(owner, name)

    def called(*arguments: Any) -> Any:
        noted()
        return method(*arguments)

    setattr(owner, name, called)


def test_stop_tokens_and_cancelled_rows_leave_while_a_step_runs(folder: Path) -> None:
    """The step that was launched with them is not theirs any more, and the others go on as before."""
    plain, ahead = served(folder, None), served(folder, TracedSteps())
    alone = plain.generate([greedy([5, 6, 7], 12)])[0]
    asked = [
        greedy([5, 6, 7], 12) | {"stopping": stopping(alone[4])},
        sampled([5, 6, 7], 30, seed=1),
        greedy([9], 20),
    ]
    assert ahead.generate(asked) == plain.generate(asked)
    assert len(ahead.generate(asked)[0]) == alone.index(alone[4]) + 1


def stopping(token: int) -> Any:
    return greedy([1], 12, token_ids=frozenset({token}))["stopping"]


def test_warming_up_meets_every_number_of_rows_and_leaves_nothing(folder: Path) -> None:
    server = served(folder, TracedSteps(), max_sequences=10)
    batch, runner = server.engine.batch, TracedSteps()
    assert isinstance(batch, SlotBatch)
    batch.runner = runner
    batch.warm_up()
    assert [rows for rows, _ in runner.traces] == [1, 2, 4, 8, 16]
    assert batch.cache.cells == 0
    assert server.generate(requests(6)) == served(folder, None).generate(requests(6))
