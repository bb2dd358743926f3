"""guidellm: a short run of its load, after it has asked /health."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import SCENE, report, same

REQUESTS = 3


class RefusedError(Exception):
    """The program ended with an exit code that is not 0."""


def run(form: str) -> Any:
    """The report's only benchmark. Raises RefusedError with the last words of the program."""
    folder = Path(tempfile.mkdtemp())
    backend = (
        f"kind=openai_http,target={SCENE.url},model={SCENE.model},api_key={SCENE.key},request_format={form}"
    )
    command = [
        sys.executable, "-m", "guidellm", "run", "--backend", backend, "--profile", "kind=synchronous",
        "--constraint", f"kind=max_requests,count={REQUESTS}", "--data",
        "kind=synthetic_text,prompt_tokens=16,output_tokens=8", "--tokenizer",
        f"kind=huggingface_auto,model={SCENE.tokenizer}", "--output",
        f"kind=json,path={folder / 'report.json'}",
    ]  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder), "HF_HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RefusedError((done.stderr + done.stdout)[-900:])
    (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    return benchmark


def chat() -> None:
    same(run("/v1/chat/completions")["metrics"]["request_totals"]["successful"], REQUESTS)


def completions() -> None:
    same(run("/v1/completions")["metrics"]["request_totals"]["successful"], REQUESTS)


report("guidellm", (RefusedError,), {"chat": chat, "completions": completions})
