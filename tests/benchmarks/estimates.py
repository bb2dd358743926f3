"""Predicted seconds, memory and bytes beside the facts, per stage and recipe.

    python tests/benchmarks/estimates.py                       the bundled model, and wider random layers
    python tests/benchmarks/estimates.py --only "gptq w4"      the cases whose name contains this

The device's rates are measured first, as a worker does while it waits, with the same number of threads.
Facts are processor seconds divided by the threads: those of a busy host hardly differ from an idle one's.
Reading the texts is not predicted, nor is what a target tries beyond the recipe as asked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from quantize import MODEL, run_child  # noqa: E402
from random_model import write_model  # noqa: E402

from app.core.planning.device_profile import profile_of  # noqa: E402

STAGES = ("calibrating", "searching", "packing", "verifying", "evaluating")
FACTOR = 2.0  # each stage should be within this
NOTICEABLE_S = 0.3  # shorter stages are mostly the cost of starting anything
W2 = {"bits": 2, "group_size": 64}
GPTQ = {"method": "gptq", "symmetric": True}
BUNDLED: dict[str, dict[str, Any]] = {
    "rtn w4 g128": {"recipe": {"method": "rtn"}},
    "awq w4 g128": {},
    "awq w8, whole rows": {"recipe": {"bits": 8, "group_size": -1}},
    "awq w3 g32 without clip": {"recipe": {"bits": 3, "group_size": 32, "search": {"clip": False}}},
    "awq w2 g64": {"recipe": W2},
    "awq w4, evolutionary": {"recipe": {"search": {"strategy": "evolutionary"}}},
    "awq w3 g64, gptq": {"recipe": {"bits": 3, "group_size": 64, "rounding": "gptq"}},
    "gptq w4 g128": {"recipe": GPTQ, "formats": ["gptq", "compressed-tensors"]},
    "omniquant w2 g64": {"recipe": {"method": "omniquant", **W2, "search": {"epochs": 4}}},
    "awq, rtn and gptq": {"recipe": [{}, {"method": "rtn", "bits": 3}, {**GPTQ, "bits": 3}]},
    "a target met at once": {"recipe": {}, "target": {"max_kl": 0.1}},
    "long text, few samples": {"calibration": {"num_samples": 8, "sequence_length": 1024}},
}
SCHEMES = {
    "rtn": ("fp8", "fp8-block", "w8a8", "nvfp4a16", "mxfp4"),
    "awq": ("fp8", "w8a8", "w4a8", "nvfp4", "mxfp4a16"),
    "gptq": ("fp8", "fp8-block", "w8a8", "nvfp4", "mxfp4a16"),
}
BUNDLED |= {
    f"{method} {scheme}": {"recipe": {"method": method, "scheme": scheme}}
    for method, schemes in SCHEMES.items()
    for scheme in schemes
}
WIDE: dict[str, dict[str, Any]] = {
    "awq w4 g128": {},
    "gptq w4 g128": {"recipe": GPTQ},
    "rtn w4 g128": {"recipe": {"method": "rtn"}},
    "awq fp8": {"recipe": {"scheme": "fp8"}},
    "awq nvfp4": {"recipe": {"scheme": "nvfp4"}},
    "gptq nvfp4": {"recipe": {"method": "gptq", "scheme": "nvfp4"}},
}
WIDTHS = {"hidden 1024": ("small", 2), "hidden 2048": ("tinyllama-1.1b", 1)}  # random layers of these shapes


def measured_profile(options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "workers.devices.profile_measurement",
        "--device",
        options.device,
        "--folder",
        "/tmp",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    rates: dict[str, float] = {}
    for line in done.stdout.splitlines():
        rates |= json.loads(line)
    return profile_of("cpu" if options.device == "cpu" else "cuda", rates).model_dump(mode="json")


def compare(name: str, changes: dict[str, Any], model: Path, options: argparse.Namespace) -> list[float]:
    """Print one case; predicted over fact of the stages that are noticeable."""
    text = {"calibration": {"num_samples": 32}, "evaluation": {"num_samples": 16}}
    report = run_child({**text, **changes}, model, options)
    prediction, ratios, cells = report["prediction"], [], []
    for stage in STAGES:
        predicted = prediction["seconds"].get(stage, 0.0)
        fact = report["cpu_seconds"][stage] / options.threads
        if options.device != "cpu":
            fact = report["stages"][stage]
        ratio = predicted / fact
        if max(predicted, fact) >= NOTICEABLE_S:
            ratios.append(ratio)
        cells.append(f"{predicted:.2f} / {fact:.2f} ({ratio:.2f})")
    written = sum(sum(candidate["bytes"].values()) for candidate in report["candidates"])
    memory = prediction["ram_bytes"] / report["peak_rss_bytes"]
    sizes = sum(prediction["output_bytes"]) / written
    wall = sum(report["stages"][stage] for stage in STAGES)
    print(f"| {name} | {' | '.join(cells)} | {wall:.1f} | {memory:.2f} | {sizes:.4f} |", flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    options.profile = measured_profile(options)
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.threads} threads")
    print(json.dumps(options.profile))
    print(f"\n| case | {' | '.join(STAGES)} | wall, s | memory | bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cases = [(name, changes, MODEL) for name, changes in BUNDLED.items()]
        for width, (shape, _) in WIDTHS.items():
            cases += [(f"{width}: {name}", changes, Path(folder) / shape) for name, changes in WIDE.items()]
        ratios = list[float]()
        for name, changes, model in cases:
            if options.only not in name:
                continue
            if not model.exists():
                write_model(model, model.name, dict(WIDTHS.values())[model.name])
            ratios += compare(name, changes, model, options)
    within = sum(1 / FACTOR <= ratio <= FACTOR for ratio in ratios)
    print(f"\n{within} of {len(ratios)} stages of at least {NOTICEABLE_S} s within a factor of {FACTOR:g}")


if __name__ == "__main__":
    main()
