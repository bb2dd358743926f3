"""lm-eval's loglikelihood tasks over HTTP, against lm-eval's own `hf` backend on the same folder and CPU.

    python -m tests.benchmarks.loglikelihoods FOLDER --peer-python PYTHON [--documents N] [--batch N]

PYTHON is that of an environment with lm-eval and its api extra. The documents are the bundled ones of
`continuation` (four ends of a passage); both sides get them as batches of tokens, in turns, with one thread.
Every answer is compared: the choice, the log-likelihoods, and whether each was the greedy text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.integration.inference_process import NAME, inference_server

REPOSITORY = Path(__file__).parents[2]
TASK = "nibble_continuation"
THREADS = 1


@dataclass(frozen=True)
class Run:
    """What lm-eval wrote of one backend."""

    seconds: float  # of its requests alone, by its progress bar; with neither start nor loading
    choices: list[int]
    answers: list[tuple[float, bool]]  # log-likelihood, whether greedy


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def evaluate(options: argparse.Namespace, model: str, model_arguments: str) -> Run:
    """One run of lm-eval's command line."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = REPOSITORY / "workers" / "texts" / "tasks"
        command = [
            str(options.peer_python), "-m", "lm_eval", "--model", model, "--model_args", model_arguments,
            "--tasks", TASK, "--include_path", str(tasks), "--limit", str(options.documents),
            "--batch_size", str(options.batch), "--output_path", folder, "--log_samples",
        ]  # fmt: skip
        if model == "hf":
            command += ["--device", "cpu"]
        variables = {
            **os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "OPENAI_API_KEY": "none", "HF_DATASETS_CACHE": folder,
        }  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        print(f"  {model}: the whole program took {time.perf_counter() - started:.0f} s", flush=True)
        (log,) = Path(folder).rglob(f"samples_{TASK}_*.jsonl")
        samples = sorted(
            map(json.loads, log.read_text("utf-8").splitlines()), key=lambda each: each["doc_id"]
        )
    answers = [answer(response) for sample in samples for response in sample["filtered_resps"]]
    choices = [
        max(range(len(sample["filtered_resps"])), key=lambda n, s=sample: answer(s["filtered_resps"][n])[0])  # type: ignore[misc]
        for sample in samples
    ]
    return Run(seconds_of(done.stderr), choices, answers)


def answer(response: Any) -> tuple[float, bool]:
    logprob, greedy = response
    return float(logprob), str(greedy) == "True"


def seconds_of(log: str) -> float:
    """The time of lm-eval's bar of requests, which ends as 100%|…| 800/800 [01:02<00:00, …]."""
    hours, minutes, seconds = re.findall(r"(\d+)/\1 \[(?:(\d+):)?(\d+):(\d+)<", log)[-1][1:]
    return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)


def main() -> None:
    options = arguments()
    own: list[Run] = []
    peer: list[Run] = []
    with inference_server(options.folder) as server:
        url = f"{server.url}/v1/completions"
        tokenizer = f"tokenizer_backend=huggingface,tokenizer={options.folder}"
        over_http = f"model={NAME},base_url={url},{tokenizer},timeout=600"
        for _ in range(options.rounds):
            own.append(evaluate(options, "local-completions", over_http))
            peer.append(evaluate(options, "hf", f"pretrained={options.folder},dtype=float32"))
    ours, theirs = (min(runs, key=lambda run: run.seconds) for runs in (own, peer))
    same = sum(a == b for a, b in zip(ours.choices, theirs.choices, strict=True))
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    apart = max(abs(a[0] - b[0]) for a, b in pairs)
    greedy = sum(a[1] == b[1] for a, b in pairs)
    print(
        f"nibble {version('nibble')}, {THREADS} thread, batches of {options.batch}, {sys.version.split()[0]}"
    )
    print(f"choices equal        {same} of {len(ours.choices)}")
    print(f"log-likelihoods      apart by at most {apart:.2g} of {max(abs(b[0]) for _, b in pairs):.0f}")
    print(f"greedy flags equal   {greedy} of {len(pairs)}")
    print(f"seconds              ours {ours.seconds:.0f}, hf {theirs.seconds:.0f}")
    print(f"speed                {theirs.seconds / ours.seconds:.2f} of the hf backend's")


if __name__ == "__main__":
    main()
