"""One part of gpu.py: `python tests/benchmarks/gpu_parts.py PART --device cuda:0 --work FOLDER --json FILE`.

Parts leave what later ones need in the work folder: `model` the original, `job` its artifact.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from random_model import TOKENIZER, layer_shapes, random_tensor  # noqa: E402

INHERITED = (
    "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "LIBRARY_PATH"
)  # fmt: skip


NEEDED = (
    "pydantic", "redis", "rq", "starlette", "uvicorn", "httpx", "llguidance", "prometheus_client", "psutil",
    "filelock", "obstore", "scipy", "triton", "pytest", "pytest_timeout", "hypothesis",
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    shape: tuple[int, int, int, int, int]  # hidden, intermediate, heads, key/value heads, vocabulary
    layers: int
    samples: int
    sample_length: int
    clients: tuple[int, ...]
    new_tokens: int
    long_prompt: int
    kernel_options: tuple[str, ...]
    test_files: str


EIGHT_B = Scale(
    shape=(4096, 14336, 32, 8, 128256), layers=32, samples=128, sample_length=512, clients=(1, 8, 32, 64),
    new_tokens=96, long_prompt=2000, test_files="test_*.py",
    kernel_options=(
        "--device", "cuda", "--bits", "4", "--m", "1", "16", "32", "64", "--rounds", "1",
        "--budget-s", "0.05", "--backend", "cuda", "--peers",
    ),
)  # fmt: skip
TINY = Scale(
    shape=(256, 512, 4, 2, 4096), layers=2, samples=4, sample_length=64, clients=(1, 3), new_tokens=4,
    long_prompt=40, test_files="test_serving_cuda.py",
    kernel_options=("--device", "cpu", "--bits", "4", "--shape", "256x256", "--m", "1", "--rounds", "1",
                    "--budget-s", "0.01", "--rotation-mib", "1", "--peers", "--read-gbps", "10"),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where a part runs."""

    device: torch.device
    scale: Scale
    work: Path

    @property
    def original(self) -> Path:
        return self.work / "original"

    @property
    def artifact(self) -> Path:
        return self.work / "artifact"


def facts(machine: Machine) -> dict[str, Any]:
    from importlib.metadata import version

    found: dict[str, Any] = {name: version(name) for name in ("torch", "transformers")}
    found |= {"Python": sys.version.split()[0], "processors": os.cpu_count(), "CUDA": torch.version.cuda}
    found["missing"] = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    found["commit"] = first_line("git", "describe", "--always", "--dirty")
    if machine.device.type == "cuda":
        import kernels_cuda

        found["device"] = torch.cuda.get_device_name(machine.device)
        found["driver"] = kernels_cuda.driver_version()
        found["copy TB/s"] = round(kernels_cuda.read_rate() / 1e12, 3)
        found["product TFLOP/s"] = round(kernels_cuda.product_rate() / 1e12)
    return found


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    return (done.stdout.splitlines() or ["unknown"])[0]


def tests(machine: Machine) -> dict[str, Any]:
    """tests/gpu, a process for each file: how each ended, with the names of what failed."""
    files = sorted((REPOSITORY / "tests" / "gpu").glob(machine.scale.test_files))
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:warnings", "-o", "addopts=--import-mode=importlib")

    def run(file: Path) -> str:
        command = [sys.executable, "-m", "pytest", str(file), *options, "-o", "strict_config=false"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        return "; ".join([*last, *failed])

    with ThreadPoolExecutor(len(files)) as pool:
        return dict(zip((file.name for file in files), pool.map(run, files), strict=True))


def model(machine: Machine) -> dict[str, Any]:
    """A random checkpoint; one layer's numbers for all of them, as what is timed does not depend on them."""
    started = time.monotonic()
    hidden, intermediate, heads, kv_heads, vocabulary = machine.scale.shape
    folder = machine.original
    folder.mkdir()
    torch.manual_seed(0)
    with torch.device(machine.device):
        shapes = layer_shapes(hidden, intermediate, heads, kv_heads)
        layer = {name: random_tensor(shape).cpu() for name, shape in shapes.items()}
        outside = {
            "model.embed_tokens.weight": random_tensor((vocabulary, hidden)).cpu(),
            "model.norm.weight": random_tensor((hidden,)).cpu(),
            "lm_head.weight": random_tensor((vocabulary, hidden)).cpu(),
        }
    parts = [outside] + [
        {f"model.layers.{number}.{name}.weight": tensor for name, tensor in layer.items()}
        for number in range(machine.scale.layers)
    ]
    names = [f"model-{number:05d}.safetensors" for number in range(len(parts))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save_file, parts, [folder / name for name in names]))
    index = {
        "metadata": {},
        "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    for source in TOKENIZER.glob("*"):
        if source.name not in ("config.json", "README.md") and source.suffix != ".safetensors":
            shutil.copyfile(source, folder / source.name)
    config = json.loads((TOKENIZER / "config.json").read_text("utf-8")) | {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": machine.scale.layers, "dtype": "bfloat16",
        "head_dim": hidden // heads, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return {"seconds": time.monotonic() - started}


def job(machine: Machine) -> dict[str, Any]:
    """AWQ with clip, W4 g128, as a worker's child runs it."""
    import quantize

    def keep(folder: Path, outputs: list[dict[str, Any]]) -> None:
        shutil.move(folder / outputs[0]["folder"], machine.artifact)

    scale = machine.scale
    spec = {
        "recipe": {"method": "awq", "bits": 4, "group_size": 128, "symmetric": True},
        "calibration": {"num_samples": scale.samples, "sequence_length": scale.sample_length},
        "evaluation": {"num_samples": 1}, "formats": ["compressed-tensors"],
    }  # fmt: skip
    options = argparse.Namespace(device=str(machine.device), threads=os.cpu_count(), profile=None)
    report = quantize.run_child(spec, machine.original, options, keep)
    return {"stages": report["stages"], "peak_vram_bytes": report.get("peak_vram_bytes")}


def serving(machine: Machine) -> dict[str, Any]:
    """The server, started, and asked over HTTP by so many clients at once; on a GPU with either attention."""
    from workers.serving.step_attention import KINDS

    if machine.device.type == "cpu":
        return served_figures(machine, "--steps", "traced", "--kernel-backend", "torch")
    found: dict[str, Any] = {}
    for kind in KINDS:
        try:
            figures = served_figures(machine, "--attention", kind)
        except Exception as fault:  # noqa: BLE001  # the other kind's figures stay
            found[f"{kind}: failed"] = f"{type(fault).__name__}: {str(fault)[:200]}"
        else:
            found |= {f"{kind}: {name}": value for name, value in figures.items()}
    return found


def served_figures(machine: Machine, *further: str) -> dict[str, Any]:
    import serving_engine

    from tests.integration.inference_process import NAME, inference_server

    options = [
        "--device", str(machine.device), "--max-sequences", str(max(machine.scale.clients)),
        "--max-model-len", "4096", "--threads", str(os.cpu_count() or 1), *further,
    ]  # fmt: skip
    found: dict[str, Any] = {}
    started = time.monotonic()
    with inference_server(machine.artifact, *options, inherited=INHERITED) as server:
        found["ready s"] = time.monotonic() - started
        port = server.messages[-1]["port"]
        load = serving_engine.Load(prompt_words=48, new_tokens=machine.scale.new_tokens, repeats=1)
        for clients in machine.scale.clients:
            for _ in range(2):  # the first turn captures what steps of these sizes need
                result = asyncio.run(serving_engine.run("127.0.0.1", port, NAME, load, clients))
            found[f"concurrency {clients}"] = result
        with server.client() as client:
            found["steps"] = decoder_of(client.get("/metrics").text)
            body = {"prompt": [5] * machine.scale.long_prompt, "max_tokens": 1}
            seconds = []
            for _ in range(3):
                began = time.monotonic()
                client.post("/v1/completions", json=body).raise_for_status()
                seconds.append(time.monotonic() - began)
            found[f"first token of {machine.scale.long_prompt} ms"] = 1000 * min(seconds)
    return found


def decoder_of(metrics: str) -> str:
    """How the server says that its steps run."""
    lines = [line for line in metrics.splitlines() if line.startswith("nibble:decoder_info")]
    return lines[-1].split("{")[1].split("}")[0].replace("|", "/") if lines else "unknown"


def peer(machine: Machine) -> dict[str, Any]:
    """transformers' own continuous batching with the original, in this process."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    on_gpu = machine.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    original = AutoModelForCausalLM.from_pretrained(machine.original, dtype=dtype).to(machine.device).eval()
    original.generation_config.eos_token_id = None
    config = GenerationConfig(
        max_new_tokens=machine.scale.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # On a CPU its cache would take a share of the host's memory.
    limits = ContinuousBatchingConfig(**({} if on_gpu else {"num_blocks": 16, "max_batch_tokens": 64}))
    found: dict[str, Any] = {}
    for clients in machine.scale.clients[1:2]:
        prompts = [[5 + row, *range(6, 54)] for row in range(clients)]
        for _ in range(2):
            began = time.monotonic()
            answers = original.generate_batch(
                inputs=prompts, generation_config=config, continuous_batching_config=limits
            )
            seconds = time.monotonic() - began
        tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        found[f"concurrency {clients}"] = {"tokens/s": tokens / seconds}
    return found


def kernels(machine: Machine) -> dict[str, Any]:
    """The table of kernels.py, a row for each candidate."""
    target = machine.work / "kernels.json"
    command = [sys.executable, str(REPOSITORY / "tests" / "benchmarks" / "kernels.py")]
    subprocess.run(
        [*command, *machine.scale.kernel_options, "--json", str(target)], check=True, cwd=REPOSITORY
    )
    content = json.loads(target.read_text("utf-8"))
    return {"rows": list(rows_of(content)), "whole": content}


COLUMNS = ("median_us", "fraction", "ratio")


def rows_of(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in content["rows"]:
        yield {
            "name": f"{row['shape']} M {row['rows']} {row['candidate']}",
            **{name: row[name] for name in COLUMNS},
        }


PARTS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    each.__name__: each for each in (facts, tests, model, job, serving, peer, kernels)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    machine = Machine(options.device, TINY if options.tiny else EIGHT_B, options.work)
    figures = PARTS[options.part](machine)
    options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
