"""Four bits from weights that were quantized before, beside the same job from the bundled model itself.

    python tests/benchmarks/quantized_sources.py [--samples 32] [--windows 40] [--threads 1]

The bundled model is stored in FP8 blocks and in MXFP4 by the code of the tests, rounded to nearest, and in
MXFP4 once more by a job of our own, which minimizes the error of outputs (AWQ and GPTQ).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantize import MODEL, REPOSITORY, run_child

sys.path.insert(0, str(REPOSITORY))

from tests.quantized_sources import fp8_source, mxfp4_source

RECIPE = {"method": "awq"}  # four bits, groups of 128
MXFP4 = {"method": "awq", "rounding": "gptq", "scheme": "mxfp4a16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.profile = None
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "bfloat16": MODEL,
            "FP8 in blocks of 128x128": fp8_source(MODEL, Path(folder) / "fp8"),
            "MXFP4, rounded": mxfp4_source(MODEL, Path(folder) / "mxfp4"),
            "MXFP4, by a job": job_source(Path(folder) / "job", options),
        }
        print("| source | its perplexity | to bfloat16's | W4A16 of it | to bfloat16's |")
        print("|---|---|---|---|---|", flush=True)
        plain: list[float] = []
        for name, source in sources.items():
            figures = perplexities(report_of(source, options))
            plain = plain or figures
            cells = (f"{own:.3f} | {own / other:.4f}" for own, other in zip(figures, plain, strict=True))
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def report_of(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    texts = {
        "calibration": {"num_samples": options.samples},
        "evaluation": {"num_samples": options.windows},
    }
    return run_child({"recipe": RECIPE, **texts}, source, options)


def perplexities(report: dict[str, Any]) -> list[float]:
    """The original's, and each candidate's."""
    return [report["original"]["perplexity"], *(each["perplexity"] for each in report["candidates"])]


def job_source(folder: Path, options: argparse.Namespace) -> Path:
    """The artifact of a job in the format compressed-tensors."""
    spec = {
        "recipe": MXFP4,
        "calibration": {"num_samples": options.samples},
        "evaluation": {"num_samples": 1},
    }

    def copied(work: Path, outputs: list[dict[str, Any]]) -> None:
        shutil.copytree(work / outputs[0]["folder"], folder)

    run_child(spec, MODEL, options, copied)
    return folder


if __name__ == "__main__":
    main()
