"""Perplexity and KL of every method at every setting on the bundled model, beside the peers' figures.

    python tests/benchmarks/fidelity.py [--planted] [--methods AWQ,GPTQ] [--settings 4:128,2:64]
                                        [--samples 128] [--windows 100] [--text test] [--peer-python PYTHON]

Each setting is a job of its own, and its rows are printed when it ends. `--text valid` judges on windows of
the calibration text's source that calibration does not use: for choices between variants of the engine, which
the test text must not make. The peers' figures stand beside the test text's usual 128 and 100 windows only.
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

from quantize import MODEL, calibration_tokens, evaluation_tokens, run_child, unused_text

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
SAMPLES, WINDOWS = 128, 100  # of calibration and evaluation text, that the peers' figures were taken with

Row = dict[str, Any]  # of figures
Peers = dict[tuple[int, int], dict[str, Row]]


def table(model: Path, options: argparse.Namespace, peers: Peers) -> None:
    """One job a setting; its rows, and what its best candidate is to the best peer."""
    evaluation, summaries = evaluation_spec(options), list[str]()
    for number, (bits, group) in enumerate(options.settings):
        recipes = [{**METHODS[method], "bits": bits, "group_size": group} for method in options.methods]
        spec = {"recipe": recipes, "calibration": {"num_samples": options.samples}, "evaluation": evaluation}
        report = run_child(spec, model, options)
        original = report["original"]["perplexity"]
        if number == 0:
            print(f"original {original:.3f}\n")
            print("| setting | method | perplexity | peer | ratio | KL | peer | ratio | seconds of search |")
            print("|---|---|---|---|---|---|---|---|---|")
        rows = dict(zip(options.methods, report["candidates"], strict=True))
        beside = peers.get((bits, group), {})
        print_rows(f"W{bits} g{group}", rows, beside)
        summaries.append(summary(f"W{bits} g{group}", rows, beside, original))
    print("", *summaries, sep="\n", flush=True)


def print_rows(setting: str, rows: dict[str, Row], peers: dict[str, Row]) -> None:
    for name, row in rows.items():
        peer = peers.get(name, {})
        cells = [setting, name]
        for figure, digits in (("perplexity", 3), ("kl", 5)):
            ours, theirs = row[figure], peer.get(figure)
            cells.append(f"{ours:.{digits}f}")
            cells += ["-", "-"] if theirs is None else [f"{theirs:.{digits}f}", f"{ours / theirs:.4f}"]
        print(f"| {' | '.join(cells)} | {row['seconds']['searching']:.1f} |", flush=True)


def summary(setting: str, rows: dict[str, Row], peers: dict[str, Row], original: float) -> str:
    """The best candidate, the best peer, and half of the best peer's gap to the original."""
    name = min(rows, key=lambda name: float(rows[name]["perplexity"]))
    best = float(rows[name]["perplexity"])
    text = f"{setting}: best {best:.3f} ({name}, {best / original - 1:+.2%})"
    if peers:
        peer = min(peers, key=lambda peer: float(peers[peer]["perplexity"]))
        theirs = float(peers[peer]["perplexity"])
        half, share = (original + theirs) / 2, (best - original) / (theirs - original)
        reached = "reached" if best <= half else "missed"
        text += f", best peer {theirs:.3f} ({peer}), half of its gap {half:.3f}: {reached} ({share:.2f})"
    if {"AWQ", "OmniQuant"} <= rows.keys():
        awq, learned = rows["AWQ"], rows["OmniQuant"]
        text += f"; OmniQuant / AWQ {learned['perplexity'] / awq['perplexity']:.4f}"
        text += f", KL {learned['kl'] / awq['kl']:.2f}"
    return text


def evaluation_spec(options: argparse.Namespace) -> dict[str, Any]:
    """The test text, or what calibration leaves of its own text."""
    if options.text == "test":
        return {"num_samples": options.windows}
    return {"num_samples": options.windows, "texts": [unused_text(options.samples, options.windows)]}


def kept_peers() -> Peers:
    """The peer's figures as they were taken once."""
    return {
        setting: {name: {"perplexity": figure} for name, figure in zip(PEER_METHODS, figures, strict=True)}
        for setting, figures in PEERS.items()
    }


def measured_peers(options: argparse.Namespace) -> Peers:
    """The peer's figures taken now, one process each: AWQ takes minutes a setting."""
    found: Peers = {}
    with tempfile.TemporaryDirectory() as folder:
        windows = {"windows": calibration_tokens(), "evaluation": evaluation_tokens(WINDOWS)}
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
                found.setdefault((bits, group), {})[method] = json.loads(done.stdout.splitlines()[-1])
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
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows of calibration text")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of evaluation text")
    parser.add_argument("--text", choices=("test", "valid"), default="test")
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    options.profile = None
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.threads} threads")
    usual = (options.text, options.samples, options.windows) == ("test", SAMPLES, WINDOWS)
    if options.peer_python and not usual:
        parser.error("peers are measured on the test text, with the usual numbers of windows")
    peers = measured_peers(options) if options.peer_python else kept_peers() if usual else {}
    table(MODEL, options, peers)
    if options.planted:
        with tempfile.TemporaryDirectory() as folder:
            print("\nWith planted outlier channels")
            table(plant_outliers(Path(folder) / "planted"), options, {})


if __name__ == "__main__":
    main()
