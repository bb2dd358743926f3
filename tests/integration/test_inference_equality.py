"""Greedy answers of the server's engine against transformers on the same artifact; together as alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.core.errors import ModelRefused
from app.core.formats.registry import FormatName
from tests.inference import Served, dequantized, generated, greedy, prompts_of_text
from workers.serving.loading import LoadRequest, load_model
from workers.serving.slot_batch import OPERATORS, runner_of
from workers.serving.steps import TracedSteps

PROMPTS, NEW_TOKENS = 20, 24


@pytest.fixture(scope="module")
def served(small_artifact: Path) -> Served:
    return Served(small_artifact, dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(served: Served) -> list[list[int]]:
    """Each prompt's answer when nothing else runs."""
    return [served.generate([greedy(prompt, NEW_TOKENS)])[0] for prompt in prompts_of_text(PROMPTS)]


def test_greedy_answers_are_those_of_transformers(small_artifact: Path, alone: list[list[int]]) -> None:
    """The judge loads the artifact through compressed-tensors, in float32."""
    judge = AutoModelForCausalLM.from_pretrained(small_artifact, dtype=torch.float32).eval()
    assert judge.config.quantization_config.quant_method == "compressed-tensors"
    for prompt, answer in zip(prompts_of_text(PROMPTS), alone, strict=True):
        tokens = torch.tensor([prompt])
        expected = judge.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=-1,
        )  # fmt: skip
        assert answer == expected[0, len(prompt) :].tolist()


def test_concurrent_answers_are_those_of_requests_alone(served: Served, alone: list[list[int]]) -> None:
    requests = [greedy(prompt, NEW_TOKENS) for prompt in prompts_of_text(PROMPTS)]
    assert served.generate(requests) == alone


@pytest.mark.parametrize(
    "limits",
    [{"prefill_tokens": 7}, {"max_sequences": 3}, {"max_cells": 300}],
    ids=["prompts in pieces", "few rows", "a cache that overflows"],
)
def test_scheduling_changes_no_answer(
    small_artifact: Path, alone: list[list[int]], limits: dict[str, int]
) -> None:
    served = Served(small_artifact, dtype=torch.float32, **limits)
    requests = [greedy(prompt, NEW_TOKENS) for prompt in prompts_of_text(PROMPTS)]
    assert served.generate(requests) == alone
    assert served.preemptions > 0 if "max_cells" in limits else served.preemptions == 0


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_trace_refuses_kernels_that_it_would_miss(small_artifact: Path, backend: str) -> None:
    """Those that a library computes by address; PyTorch's operators are traced."""
    loaded = load_model(LoadRequest(small_artifact, torch.device("cpu"), torch.float32, backend))
    names = {kernel.partition(": ")[2].partition(" ")[0] for kernel in loaded.kernels}
    if names <= OPERATORS:
        assert isinstance(runner_of(loaded.model, "traced"), TracedSteps)
    else:
        with pytest.raises(ModelRefused, match=f"kernels of {', '.join(sorted(names))} are none"):
            runner_of(loaded.model, "traced")


@pytest.mark.parametrize("format_name", ["awq", "gptq"])
def test_other_formats_are_read_as_they_were_written(
    artifacts: dict[str, Path], format_name: FormatName, tmp_path: Path
) -> None:
    """Against the weights that the files stand for: transformers needs further libraries to read them."""
    served = Served(artifacts[format_name], dtype=torch.float32)
    judge = dequantized(artifacts[format_name], format_name, tmp_path / "judge")
    for prompt in prompts_of_text(5)[1:]:
        assert served.generate([greedy(prompt, 8)]) == [generated(judge, prompt, 8)]
