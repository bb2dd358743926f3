"""Which families Nibble's own server answers for as transformers does: `python -m tests.families.serving`.

Adds `served` to each row of the results: true, or what went wrong, and writes the latter for the API.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from app.core.deployments.served_families import UNSERVED
from app.core.planning.family import known_types
from tests.families.table import RESULTS, late
from tests.inference import Served, greedy, prompts_of_text
from tests.tiny_models import save_model
from workers.discovery.family_discovery import working_model

NEW_TOKENS = 8
SECONDS = 90
# Hybrids that by default have no attention, which published ones have and transformers' cache needs.
SETTINGS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
}


def served(model_type: str, folder: Path) -> str | bool:
    """Whether greedy answers, together and in pieces, are those of `generate`; else what is wrong."""
    with torch.no_grad():
        model, _ = working_model({"model_type": model_type, **SETTINGS.get(model_type, {})})
    prompts = [prompt[: 26 + number] for number, prompt in enumerate(prompts_of_text(4)) if prompt]
    server = Served(save_model(model, folder), dtype=torch.float32, prefill_tokens=17)
    answers = server.generate([greedy(prompt, NEW_TOKENS) for prompt in prompts])
    if server.engine.failure:
        return str(server.engine.failure)[:200]
    model.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt])
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        if answer != expected[0, len(prompt) :].tolist():
            return "its answers would not be those of transformers"
    return True


def outcome(model_type: str) -> str | bool:
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return served(model_type, Path(folder))
    except Exception as fault:  # noqa: BLE001  # a row of the table, whatever happened
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, late)
    results: dict[str, Any] = json.loads(arguments.results.read_text("utf-8"))
    for model_type in arguments.types or sorted(known_types()):
        row = results.setdefault(model_type, {})
        row["served"] = outcome(model_type)
        print(model_type, row["served"], flush=True)  # noqa: T201  # a command
        arguments.results.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", "utf-8")
    reasons = {name: row["served"] for name, row in results.items() if isinstance(row.get("served"), str)}
    UNSERVED.write_text(json.dumps(reasons, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
