"""Opens folders with GPTQModel's loader and compares its weights; runs in an environment of its own.

    python -P gptqmodel_probe.py FOLDER [FOLDER ...]

Each holds `files`, what was published, and `expected.safetensors`, the linears' weights by name. Writes a
line of JSON for each: how many linears there are, and the largest difference over the largest weight.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file


def compare(folder: Path) -> dict[str, object]:
    opened = GPTQModel.load(
        str(folder / "files"), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    modules, differences = dict(opened.model.named_modules()), []
    for name, expected in load_file(folder / "expected.safetensors").items():
        module = modules[name]
        packed = hasattr(module, "qweight")
        found = (module.dequantize_weight().T if packed else module.weight).detach().float()
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
    with torch.no_grad():
        logits = opened.model(torch.arange(24)[None]).logits
    return {
        "linears": len(differences),
        "difference": max(differences),
        "finite": bool(torch.isfinite(logits).all()),
    }


if __name__ == "__main__":
    for path in sys.argv[1:]:
        sys.stdout.write(json.dumps({"folder": Path(path).name, **compare(Path(path))}) + "\n")
        sys.stdout.flush()
