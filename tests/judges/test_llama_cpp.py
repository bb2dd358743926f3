"""llama.cpp opens a GGUF file of SmolLM2 and computes what transformers computes of the same file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The city lies on both banks of a river. Today most of its people work in schools and small shops."
TOLERANCE = 0.02  # of the mean log-probability, nats: llama.cpp rounds activations to 8 bits in groups of 32


def test_llama_cpp_computes_as_transformers_does(llama_cpp_environment: Path, tmp_path: Path) -> None:
    (file,) = llama_cpp_environment.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokens = tokenizer(TEXT)["input_ids"]
    words = tmp_path / "tokens.json"
    words.write_text(json.dumps(tokens))
    python, probe = llama_cpp_environment / "bin" / "python", Path(__file__).with_name("llama_cpp_probe.py")
    done = subprocess.run([python, "-P", probe, file, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    said = json.loads(done.stdout.splitlines()[-1])

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens)[1:, None])
    assert len(said["log_probabilities"]) == len(tokens) - 1
    assert mean(said["log_probabilities"]) == pytest.approx(float(expected.mean()), abs=TOLERANCE)
    assert "Gravity is" in said["answer"]
