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


def answers(output: str, name: str) -> tuple[str, str]:
    """Of the original and of the quantized model."""
    original, _, quantized = output.partition("\noriginal ")[2].partition(f"\n{name} ")
    return original.strip(), quantized.removesuffix("the service is stopped and its folder removed\n").strip()


@pytest.mark.timeout(600)
def test_one_command_leads_to_an_answer(repository: Path) -> None:
    output = talked(repository, "--model", "bundled", "The history of")
    assert "/login?code=" in output
    assert "you The history of\noriginal " in output
    assert all(answers(output, "wikitext")), output


@pytest.mark.timeout(600)
def test_the_answer_makes_sense_where_smollm2_can_be_had(repository: Path) -> None:
    output = talked(repository, "What is the capital of France?")
    if "SmolLM2 can't be had here:" in output:
        pytest.skip(next(line for line in output.splitlines() if "can't be had" in line))
    assert "(awq w4 g64)" in output
    original, quantized = answers(output, "smollm2")
    assert "Paris" in original, output
    assert "Paris" in quantized, output
