"""lm-eval's loglikelihood tasks over HTTP, beside its own `hf` backend on the same tiny model.

`make clients` installs lm-eval.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests.benchmarks.loglikelihoods import evaluate
from tests.clients.conftest import installed
from tests.integration.inference_process import NAME, inference_server
from tests.tiny_models import random_model, save_model

TOLERANCE = 2e-3  # of a log-likelihood of 10 tokens in float32
DOCUMENTS = 6


def test_choices_and_log_likelihoods_equal_those_of_the_hf_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed("lm-eval") / "site-packages"))
    folder = save_model(random_model("llama"), tmp_path / "model")
    options = Namespace(peer_python=Path(sys.executable), documents=DOCUMENTS, batch=4)
    with inference_server(folder) as server:
        tokenizer = f"tokenizer_backend=huggingface,tokenizer={folder}"
        url = f"base_url={server.url}/v1/completions"
        ours = evaluate(options, "local-completions", f"model={NAME},{url},{tokenizer}")
    theirs = evaluate(options, "hf", f"pretrained={folder},dtype=float32")
    assert len(ours.choices) == DOCUMENTS
    assert ours.choices == theirs.choices
    for (own, own_greedy), (other, other_greedy) in zip(ours.answers, theirs.answers, strict=True):
        assert own == pytest.approx(other, abs=TOLERANCE)
        assert own_greedy == other_greedy
