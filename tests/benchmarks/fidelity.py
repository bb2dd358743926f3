"""Perplexity and KL of every method at every setting on the bundled model, beside the peers' figures.

    python tests/benchmarks/fidelity.py [--planted] [--methods AWQ,GPTQ] [--settings 4:128,2:64]
                                        [--peer-python PYTHON]

`--planted` runs the methods on a variant of the model with outlier channels as well: norm weights times 16,
the columns that read them divided by 16, so the function is the same and rounding is harder.
PYTHON belongs to an environment with llmcompressor==0.14.0.1: its figures are then taken anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from quantize import MODEL, calibration_tokens, evaluation_tokens, run_child

METHODS: dict[str, dict[str, str]] = {
    "rounding": {"method": "rtn"},
    "AWQ": {"method": "awq"},
    "GPTQ": {"method": "gptq"},
    "AWQ + GPTQ": {"method": "awq", "rounding": "gptq"},
    "OmniQuant": {"method": "omniquant"},
    "OmniQuant + GPTQ": {"method": "omniquant", "rounding": "gptq"},
}
SETTINGS = ((4, 128), (3, 128), (3, 64), (2, 64))
# llm-compressor 0.14.0.1 on the same windows: rounding, AWQ, GPTQ, AWQ + GPTQ.
PEER_METHODS = {"rounding": "rtn", "AWQ": "awq", "GPTQ": "gptq", "AWQ + GPTQ": "awq+gptq"}
PEERS = {
    (4, 128): (59.727, 59.671, 59.433, 59.472),
    (3, 128): (60.560, 60.654, 59.721, 59.768),
    (3, 64): (60.380, 60.279, 59.535, 59.670),
    (2, 64): (67.926, 67.201, 61.165, 61.430),
}
PLANTED = 16.0
MAX_RECIPES = 16  # of one job


def fidelity(model: Path, options: argparse.Namespace) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The reports of the candidates of each setting, in the order of the methods."""
    recipes = [
        {**METHODS[method], "bits": bits, "group_size": group}
        for bits, group in options.settings
        for method in options.methods
    ]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(recipes), MAX_RECIPES):
        part = recipes[start : start + MAX_RECIPES]
        report = run_child({"recipe": part, "evaluation": {"num_samples": 100}}, model, options)
        rows += report["candidates"]
    print(f"original {report['original']['perplexity']:.3f}")
    found = iter(rows)
    return {setting: [next(found) for _ in options.methods] for setting in options.settings}


def print_table(
    rows: dict[tuple[int, int], list[dict[str, Any]]],
    peers: dict[tuple[int, int], dict[str, float]],
    methods: list[str],
) -> None:
    print("| setting | method | perplexity | peer | ratio | KL | seconds of search and rounding |")
    print("|---|---|---|---|---|---|---|")
    for (bits, group), candidates in rows.items():
        for name, candidate in zip(methods, candidates, strict=True):
            peer = peers.get((bits, group), {}).get(name)
            beside = f"{peer:.3f} | {candidate['perplexity'] / peer:.4f}" if peer else "- | -"
            print(
                f"| W{bits} g{group} | {name} | {candidate['perplexity']:.3f} | {beside} "
                f"| {candidate['kl']:.5f} | {candidate['seconds']['searching']:.1f} |"
            )


def kept_peers() -> dict[tuple[int, int], dict[str, float]]:
    """The peer's figures as they were taken once."""
    return {setting: dict(zip(PEER_METHODS, figures, strict=True)) for setting, figures in PEERS.items()}


def measured_peers(options: argparse.Namespace) -> dict[tuple[int, int], dict[str, float]]:
    """The peer's figures taken now, one process each: AWQ takes minutes a setting."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        windows = {"windows": calibration_tokens(), "evaluation": evaluation_tokens(100)}
        for name, tokens in windows.items():
            (Path(folder) / name).write_text(json.dumps(tokens), "utf-8")
        for bits, group in options.settings:
            for method in (method for method in options.methods if method in PEER_METHODS):
                command = [
                    options.peer_python, "-P", str(Path(__file__).with_name("peer_llmcompressor.py")),
                    "--model", str(MODEL), "--windows", "windows", "--evaluation", "evaluation",
                    "--threads", str(options.threads), "--dtype", "float32",
                    "--method", PEER_METHODS[method], "--bits", str(bits), "--group-size", str(group),
                ]  # fmt: skip
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
                figure = json.loads(done.stdout.splitlines()[-1])["perplexity"]
                found.setdefault((bits, group), {})[method] = figure
    return found


def plant_outliers(folder: Path) -> Path:
    """A copy of the bundled model with every 32nd channel of each norm enlarged; same function."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    layers = json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(layers):
        for norm, linears in readers.items():
            tensors[f"model.layers.{layer}.{norm}.weight"][::32] *= PLANTED
            for linear in linears:
                tensors[f"model.layers.{layer}.{linear}.weight"][:, ::32] /= PLANTED
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings_of(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (setting.split(":") for setting in text.split(","))
    return tuple((int(bits), int(group)) for bits, group in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--settings", type=settings_of, default=SETTINGS, help="bits:group size, by commas")
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    options.profile = None
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.threads} threads")
    peers = measured_peers(options) if options.peer_python else kept_peers()
    print_table(fidelity(MODEL, options), peers, options.methods)
    if options.planted:
        with tempfile.TemporaryDirectory() as folder:
            print("\nWith planted outlier channels")
            planted = fidelity(plant_outliers(Path(folder) / "planted"), options)
            print_table(planted, {}, options.methods)


if __name__ == "__main__":
    main()
