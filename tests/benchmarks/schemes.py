"""Each scheme beside llm-compressor's same scheme on SmolLM2: perplexity, KL and top-1 agreement.

    python tests/benchmarks/schemes.py [--schemes fp8,w8a8] [--methods rtn,gptq] [--gguf FILE]
                                       [--kv-cache] [--peer-python PYTHON]

One job has all recipes. The peer rounds plainly (QuantizationModifier with its preset), in a process for each
scheme, on the same windows. `--kv-cache` has each recipe again with an FP8 cache, which the peer's has not.
The model is rotated, as in fidelity.py. PYTHON belongs to an environment with
llmcompressor==0.14.0.1.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from quantize import Text, run_child
from real_model import wheel_file, write_model

PRESETS = {
    "fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "w8a8": "W8A8", "nvfp4": "NVFP4", "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4", "mxfp4a16": "MXFP4A16", "w4a8": "W4AFP8",
}  # fmt: skip
SAMPLES, WINDOWS, LENGTH = 32, 40, 256


def peer(model: Path, scheme: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        text = Text(model, LENGTH)
        for name, tokens in (
            ("windows", text.calibration(SAMPLES)), ("evaluation", text.evaluation(WINDOWS))
        ):  # fmt: skip
            (Path(folder) / name).write_text(json.dumps(tokens), "utf-8")
        command = [
            options.peer_python, "-P", str(Path(__file__).with_name("peer_llmcompressor.py")),
            "--model", str(model), "--windows", "windows", "--evaluation", "evaluation",
            "--threads", str(options.threads), "--dtype", "float32", "--preset", PRESETS[scheme],
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(PRESETS))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["rtn"])
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file; by default that of its wheel")
    parser.add_argument("--kv-cache", action="store_true", help="each recipe with an FP8 cache as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    options.device, options.profile = "cpu", None
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smollm2"
        write_model(model, options.gguf or wheel_file(), plain=False)
        peers = {name: peer(model, name, options) for name in options.schemes if options.peer_python}
        recipes = [
            {"scheme": name, "method": method} for name in options.schemes for method in options.methods
        ]
        if options.kv_cache:
            recipes = [{**each, "kv_cache": cache} for each in recipes for cache in (None, "fp8")]
        spec = {
            "recipe": recipes,
            "calibration": {"num_samples": SAMPLES, "sequence_length": LENGTH},
            "evaluation": {"num_samples": WINDOWS},
        }
        report = run_child(spec, model, options)
    print(f"original {report['original']['perplexity']:.3f}\n")
    print(
        "| recipe | perplexity | peer | KL | peer | ratio | top-1 | peer |\n|---|---|---|---|---|---|---|---|"
    )
    for recipe, row in zip(recipes, report["candidates"], strict=True):
        theirs = peers.get(recipe["scheme"])
        cells = [row["label"], f"{row['perplexity']:.3f}", "-", f"{row['kl']:.5f}", "-", "-"]
        cells += [f"{row['top1_agreement']:.2%}", "-"]
        if theirs is not None:
            cells[2], cells[4] = f"{theirs['perplexity']:.3f}", f"{theirs['kl']:.5f}"
            cells[5], cells[7] = f"{row['kl'] / theirs['kl']:.3f}", f"{theirs['top1']:.2%}"
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
