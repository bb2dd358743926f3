"""Opens originals and our files of families with vLLM's own loader; runs in an environment of its own.

    python vllm_family_probe.py FOLDER [FOLDER ...]

Each folder has a work.json: `original` (a model folder), `quantized` (several) and `windows` (lists of
token ids). Into each it writes said.json, a list of what came of the original and of each quantized one:
`perplexity` and the `dtype` in which it was computed, or `error`; and `kl` from the original (nats a token)
where both ran. Each model runs in a fork of this process, which has loaded vLLM: one that ends its process
ends no other, and loading takes longest.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from vllm_probe import log_probabilities  # first: it sets vLLM's environment

# isort: split
import torch
from vllm import LLM
from vllm.model_executor.models import registry

SECONDS = 400  # for one model
ORIGINAL, QUANTIZED = ("float32", "bfloat16"), ("float16", "bfloat16")
DTYPE = re.compile(r"b?float16|float32|BF16|half|dtype", re.IGNORECASE)
TAIL = 8000  # characters of what vLLM printed


def inspected(model: Any) -> Any:
    """What vLLM wants to know of a class before it loads a model; not in a process that loads vLLM again."""
    return registry._ModelInfo.from_model_cls(model.load_model_cls())


registry._LazyRegisteredModel.inspect_model_cls = inspected


class Late(Exception):
    """vLLM takes too long."""


def late(*_: object) -> None:
    raise Late(f"no answer within {SECONDS} s")


def child(model: str, dtype: str, windows: list[list[int]], results: Path) -> None:
    """The fork: what vLLM prints goes into a log, and the log-probabilities or the error beside it."""
    log = os.open(results / "vllm.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    config = json.loads((Path(model) / "config.json").read_text())
    further: dict[str, Any] = {"language_model_only": True} if "vision_config" in config else {}
    try:
        opened = LLM(
            model,
            dtype=dtype,  # type: ignore[arg-type]
            enforce_eager=True,
            max_num_seqs=4,
            max_model_len=256,
            max_logprobs=-1,
            **further,
        )
        torch.save(log_probabilities(opened, windows), results / "log_probabilities.pt")
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line  # of an assertion without words
        (results / "error").write_text(f"{type(error).__name__}: {str(error) or line}")
        traceback.print_exc()  # the fork ends before Python would
        raise


def computed(model: str, dtype: str, windows: list[list[int]], results: Path) -> torch.Tensor | str:
    """(windows, positions but the first, vocabulary), or vLLM's words."""
    for name in ("error", "log_probabilities.pt"):
        (results / name).unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            child(model, dtype, windows, results)
        finally:
            sys.stderr.flush()
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if (results / "error").exists():
        return (results / "error").read_text()
    if status or not (results / "log_probabilities.pt").exists():
        tail = (results / "vllm.log").read_text(errors="replace")[-TAIL:]
        return f"the process ended with {status}: {tail}"
    log_probabilities: torch.Tensor = torch.load(results / "log_probabilities.pt")
    return log_probabilities


def said(work: dict[str, Any], results: Path) -> list[dict[str, Any]]:
    targets = torch.tensor(work["windows"])[:, 1:, None]
    original: torch.Tensor | None = None
    rows: list[dict[str, Any]] = []
    for index, model in enumerate((work["original"], *work["quantized"])):
        for dtype in QUANTIZED if index else ORIGINAL:
            own = computed(model, dtype, work["windows"], results)
            if isinstance(own, torch.Tensor) or not DTYPE.search(own):
                break
        if isinstance(own, str):
            rows.append({"error": own})
            continue
        original = original if index else own
        row = {"dtype": dtype, "perplexity": float(own.gather(2, targets).mean().neg().exp())}
        if original is not None:
            row["kl"] = float((original.exp() * (original - own)).sum(-1).mean())
        rows.append(row)
    return rows


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        text = json.dumps(said(json.loads((folder / "work.json").read_text()), folder))
        (folder / "said.json").write_text(text)
        print(folder.name, text[:800], flush=True)  # noqa: T201  # a command


if __name__ == "__main__":
    main()
