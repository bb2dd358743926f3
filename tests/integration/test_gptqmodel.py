"""GPTQModel's own loader opens our GPTQ files; where GPTQMODEL_PYTHON names an environment that has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.integration.test_engine_judges import EIGHT, THREE, recipe
from tests.tiny_models import EngineRun, random_model, save_model, tiny_spec
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint

PYTHON = os.environ.get("GPTQMODEL_PYTHON")
CASES = {
    "llama w4": ("llama", {"bits": 4}),
    "mistral w3 channel": ("mistral", {"bits": 3, "group_size": -1}),
    "qwen2 w8": ("qwen2", {"bits": 8}),
    "qwen3 gptq w3": ("qwen3", {"bits": 3, "method": "gptq"}),
    "qwen3 w2 mixed": ("qwen3", {"bits": 2, "ignore": ("o_proj",), "overrides": (EIGHT, THREE)}),
    "gemma2 w4": ("gemma2", {"bits": 4}),
}
FLOAT16_STEP = 2**-11  # GPTQModel multiplies integers and scales in float16


def judged(folder: Path, model_type: str, changes: dict[str, object]) -> Path:
    """A folder for the probe."""
    model = save_model(random_model(model_type), folder / "model")
    run = EngineRun(tiny_spec(recipe(symmetric=True, **changes), formats=("gptq",)), model, folder / "work")
    shutil.copytree(run.folder("gptq"), folder / "files")
    plan = run.opened.plan
    written = FormatFolder(run.folder("gptq"), "gptq", run.opened.checkpoint, plan, plan.candidates[0])
    checkpoint, expected = Checkpoint(written.folder), {}
    for layer in range(plan.num_layers):
        weights = written.read_weights(checkpoint, layer)
        for linear in plan.architecture.at(layer).linears:
            name = plan.architecture.layer_prefix(layer) + linear
            expected[name] = weights[linear + ".weight"].float().contiguous()
    save_file(expected, folder / "expected.safetensors")
    return folder


@pytest.mark.skipif(PYTHON is None, reason="GPTQMODEL_PYTHON names no environment with GPTQModel")
def test_gptqmodel_opens_our_files(tmp_path: Path) -> None:
    assert PYTHON is not None
    folders = [str(judged(tmp_path / name, *case)) for name, case in CASES.items()]
    probe = Path(__file__).with_name("gptqmodel_probe.py")
    done = subprocess.run(
        [PYTHON, "-P", str(probe), *folders], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert [each["folder"] for each in found] == list(CASES)
    for each in found:
        assert each["linears"] == 14
        assert each["difference"] <= FLOAT16_STEP, each["folder"]
        assert each["finite"]
