"""lm-eval: loglikelihoods and texts over /v1/completions, and chats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import SCENE, report, same

TASKS = Path(__file__).parents[3] / "workers" / "texts" / "tasks"
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 30, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class RefusedError(Exception):
    """The program ended with an exit code that is not 0."""


def evaluate(task: str, model: str = "local-completions") -> Any:
    """The figures of the task. Raises RefusedError with the last words of the program."""
    folder = Path(tempfile.mkdtemp())
    documents = folder / "documents.jsonl"
    documents.write_text(json.dumps({"question": "Say:", "answer": SCENE.said}) + "\n")
    (folder / "written.yaml").write_text(WRITTEN.format(file=documents))
    route = "chat/completions" if "chat" in model else "completions"
    arguments = (
        f"model={SCENE.model},base_url={SCENE.base}/{route},tokenizer_backend=huggingface,"
        f"tokenizer={SCENE.tokenizer},max_retries=1,num_concurrent=2"
    )
    command = [
        sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", task,
        "--include_path", str(folder if task == "written" else TASKS), "--limit", "2", "--batch_size", "1",
        "--output_path", str(folder / "out"), *(("--apply_chat_template",) if "chat" in model else ()),
    ]  # fmt: skip
    environment = {
        **os.environ, "OPENAI_API_KEY": SCENE.key, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder),
        "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        raise RefusedError(done.stderr[-900:])
    (results,) = (folder / "out").rglob("results_*.json")
    return json.loads(results.read_text())["results"][task]


def scores() -> None:
    assert 0 <= evaluate("nibble_continuation")["acc,none"] <= 1


def completions() -> None:
    same(evaluate("written")["exact_match,none"], 1)


def chat() -> None:
    same(evaluate("written", "local-chat-completions")["exact_match,none"], 1)


report("lm-eval", (RefusedError,), {"scores of prompts": scores, "completions": completions, "chat": chat})
