"""`nibble discover` on a type, on a folder, and on what is neither."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from app.core.planning.family import Family, known_family

MODEL = Path(__file__).parent.parent.parent / "examples" / "wikitext-llama-6m"


def discover(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", "discover", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_type_is_shown_as_its_file_has_it() -> None:
    shown = discover("qwen3", "--json")
    assert shown.returncode == 0, shown.stderr
    assert Family.model_validate_json(shown.stdout) == known_family("qwen3")


def test_a_folder_is_shown_with_each_group_and_what_takes_its_scales() -> None:
    shown = discover(str(MODEL))
    assert shown.returncode == 0, shown.stderr
    assert "self_attn.o_proj <- self_attn.v_proj (linear, all, shared by heads)" in shown.stdout
    assert "mlp.gate_proj, mlp.up_proj <- post_attention_layernorm (norm, all)" in shown.stdout


def test_what_is_neither_is_refused_with_a_way_on() -> None:
    shown = discover("no_such_type", "--json")
    assert shown.returncode == 1
    fault = json.loads(shown.stderr)
    assert fault["code"] == "architecture_unsupported"
    assert "no_such_type" in fault["message"]
    assert "folder" in fault["remedy"]
    plain = discover("no_such_type")
    assert plain.stderr.startswith("error 'no_such_type' is neither")
