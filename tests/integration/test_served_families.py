"""The server's engine on families with recurrences, towers and windows: its answers are transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.inference import Served, greedy, prompts_of_text
from tests.tiny_models import save_model
from workers.discovery.random_weights import tiny_model

NEW_TOKENS = 10
FAMILIES = ("qwen3_5", "lfm2", "jamba", "gemma3", "gemma4", "qwen3_vl", "gpt_oss", "qwen3_next", "apertus")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_answers_together_and_in_pieces_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    with torch.no_grad():
        model = tiny_model({"model_type": model_type})
    prompts = [prompt[: 26 + number] for number, prompt in enumerate(prompts_of_text(6)) if prompt]
    served = Served(save_model(model, tmp_path), dtype=torch.float32, prefill_tokens=17)
    answers = served.generate([greedy(prompt, NEW_TOKENS) for prompt in prompts])
    model.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt])
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        assert answer == expected[0, len(prompt) :].tolist()
