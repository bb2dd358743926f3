"""A format that the service lacks, added to a copy of its code in three files: from plan to served model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from app.core.records.specs import JobSpec
from tests.tiny_models import random_model, save_model

DESCRIPTION = """
from app.core.formats.file_format import FileFormat, FormatRefusal, StoredTensor

class ByteRowsFormat(FileFormat):
    suffixes = ("bytes", "scales", "zeros")
    multiples = (2, 1)
    config_file = "byte_rows.json"

    def tensors(self, out_features, in_features, scheme, dtype):
        grid = (out_features, scheme.groups(in_features))
        return {
            "bytes": StoredTensor((out_features, in_features), "U8"),
            "scales": StoredTensor(grid, dtype),
            "zeros": StoredTensor(grid, "U8"),
        }

    def entry(self, modules):
        return {"quant_method": "byte-rows", "bits": modules.common.bits, "kept": list(modules.unquantized)}

    def refusal(self, schemes):
        if any(scheme.symmetric for scheme in schemes):
            return FormatRefusal(why="always has zero points", nearest="symmetric false")
        return None

    def loader_notes(self, modules, model_type):
        yield f"nothing but this test opens byte-rows of {model_type}"

    def unreadable(self, entry):
        return "its bits are missing" if "bits" not in entry else None
"""
PACKING = """
from kernels.operators import pack
from kernels.weight import PackedWeight
from workers.formats.packings import group_size_of

def pack_linear(weight, dtype):
    return {"bytes": weight.q, "scales": weight.scale.to(dtype), "zeros": weight.zero}

def unpack_linear(stored, entry, scheme=None):
    q, scales = stored["bytes"], stored["scales"]
    bits, groups = entry["bits"], group_size_of(q.shape[1], scales.shape[1])
    return PackedWeight(pack(q, bits), scales, stored["zeros"], bits, groups, q.shape[1])
"""
REGISTRATION = (
    ("FormatName = Literal[", 'FormatName = Literal["byte-rows", '),
    ('    "awq": AwqFormat(),\n', '    "awq": AwqFormat(),\n    "byte-rows": ByteRowsFormat(),\n'),
    ("\nFormatName", "\nfrom app.core.formats.byte_rows import ByteRowsFormat\n\nFormatName"),
)
USE = """
import json, sys
from pathlib import Path
from typing import get_type_hints

import torch

from app.commands.job_options import JobOptions
from app.core.errors import NibbleError, VerificationFailed
from app.core.jobs.estimate import estimate
from app.core.jobs.submission import CheckedSubmission
from app.core.planning.plan import plan_job
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from app.main import create_app
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint
from workers.quantization.grid import grouped_view, min_max_grid
from workers.quantization.layer import LayerResult
from workers.quantization.rounding import round_nearest
from workers.serving.loading import LoadRequest, load_model

source, folder = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2])

def job(**recipe):
    return JobSpec(model="file:///model", recipe={"group_size": 32, **recipe}, formats=["byte-rows"])

def code_of(action):
    try:
        action()
    except NibbleError as fault:
        return f"{fault.code}: {fault}"

plan = plan_job(job(), source.config, source.tensors)
candidate = plan.candidates[0]
checked = CheckedSubmission(spec=job(), plan=plan, download_bytes=0, fingerprint="")
figures = estimate(checked, "cpu")

def layer(number):
    prefix = plan.architecture.layer_prefix(number)
    quantized = {}
    for linear in candidate.linears:
        if linear.scheme is not None and linear.name.startswith(prefix):
            weight = source.tensor(linear.name + ".weight").float()
            grid = min_max_grid(grouped_view(weight, linear.scheme), linear.scheme, torch.bfloat16)
            quantized[linear.name.removeprefix(prefix)] = round_nearest(weight, grid, linear.scheme)
    return LayerResult(quantized, {}, [])

written = FormatFolder(folder, "byte-rows", source, plan, candidate)
written.write(layer, 10**9)
written.verify(layer)
stored = Checkpoint(folder)
loaded = load_model(LoadRequest(folder, torch.device("cpu"), torch.float32, "torch"))
name = candidate.linears[0].name
served = loaded.model.get_submodule(name)
x = torch.randn(2, served.in_features)
expected = written.read_weights(stored, 0)[name.removeprefix(plan.architecture.layer_prefix(0)) + ".weight"]
file = folder / "model.safetensors"
content = bytearray(file.read_bytes())
content[stored.tensors[name + ".bytes"].start] ^= 1
file.write_bytes(content)
described = create_app(Settings()).openapi()["components"]["schemas"]["JobSpec"]
print(json.dumps({
    "listed": described["properties"]["formats"]["items"]["enum"],
    "option": get_type_hints(JobOptions, include_extras=True)["formats"].__metadata__[0].help,
    "refused": code_of(lambda: plan_job(job(symmetric=True), source.config, source.tensors)),
    "notes": figures.notes,
    "planned": [candidate.output_bytes["byte-rows"], figures.candidates[0].output_bytes["byte-rows"]],
    "written": sum(tensor.size for tensor in stored.tensors.values()),
    "files": sorted(path.name for path in folder.glob("*.json")),
    "served": sum(loaded.kernels.values()),
    "linears": len(candidate.linears),
    "close": torch.allclose(served(x), torch.nn.functional.linear(x, expected, served.bias), atol=1e-5),
    "flipped": code_of(lambda: written.verify(layer)),
}))
"""


def test_a_further_format_is_three_files(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        JobSpec(model="file:///model", formats=("byte-rows",))  # type: ignore[arg-type]
    code = tmp_path / "code"
    for package in ("app", "workers", "kernels"):
        shutil.copytree(repository / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "app/core/formats/byte_rows.py").write_text(DESCRIPTION)
    (code / "workers/formats/byte_rows_packing.py").write_text(PACKING)
    registry = code / "app/core/formats/registry.py"
    text = registry.read_text()
    for before, after in REGISTRATION:
        assert text.count(before) == 1
        text = text.replace(before, after)
    registry.write_text(text)

    model = save_model(random_model("qwen2", torch.bfloat16), tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", USE, str(model), str(tmp_path / "artifact")],
        cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert "byte-rows" in seen["listed"]  # the dashboard's form reads this
    assert "byte-rows" in seen["option"]
    assert seen["refused"].startswith("format_cannot_hold_recipe")
    assert "always has zero points" in seen["refused"]
    assert "recipe 0: nothing but this test opens byte-rows of qwen2" in seen["notes"]
    assert seen["planned"] == [seen["written"], seen["written"]]
    assert "byte_rows.json" in seen["files"]
    assert seen["served"] == seen["linears"] > 0
    assert seen["close"]
    assert seen["flipped"].startswith("verification_failed")
