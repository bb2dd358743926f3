"""Tiny random models of families, quantized end to end and opened by transformers: `make families`.

    python -m tests.families.table [TYPE ...] [--results FILE]

Without types: every known family.
The results are read by tests/families/page.py, which writes docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import tempfile
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from app.core.errors import NibbleError, RecipeUnsupported
from app.core.planning.family import known_types
from app.core.records.specs import Recipe, SearchSpec
from tests.tiny_models import EngineRun, save_model, tiny_spec
from workers.discovery.family_discovery import working_model

RESULTS = Path(__file__).parent / "results.json"
RECIPE = Recipe(symmetric=True, group_size=32, indivisible="skip", search=SearchSpec(grid_points=4))
EXPERTS = r"re:.*\.experts\..*"
SECONDS = 180  # for one family
SELF_CHECK = 2e-6
# Of these a layer in float32 is 1.2e-6 off the same in float64, so two runs of it may be further apart.
ROUNDED = ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
OPENS_NEAR = 0.05  # relative difference of the KL that we state and that of what transformers opens


def family_row(model_type: str, folder: Path) -> dict[str, Any]:
    """What came of one type: figures, or the reason of a refusal or a fault."""
    row: dict[str, Any] = {}
    try:
        with torch.no_grad():
            model, _ = working_model({"model_type": model_type})
        row |= quantized(model, folder)
    except NibbleError as refusal:
        row["refused"] = refusal.message
    except Exception as fault:  # noqa: BLE001  # a row of the table, whatever happened
        row["fault"] = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        if model_type not in known_types():
            row["refused"] = row.pop("fault")
        else:
            traceback.print_exc()
    return row


def quantized(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Figures of a job on the model, and of its files opened by transformers.

    Where these are not opened right, and the model has experts, of files whose experts keep their precision
    too.
    """
    source = save_model(model, folder / "model")
    run = EngineRun(tiny_spec(RECIPE), source, folder / "work")
    report = run.report.candidates[0]
    linears = [entry for layer in report.layers for entry in layer.linears if entry.bits]
    row: dict[str, Any] = {
        "class": type(model).__name__,
        "self_check": max(layer.equivalence_error for layer in report.layers),
        "linears": len(linears),
        "scaled": sum(entry.ratio is not None for entry in linears),
        **opened_files(model, run),
    }
    if not is_right(row) and any(".experts." in name for name in model.state_dict()):
        kept = RECIPE.model_copy(update={"ignore": (*RECIPE.ignore, EXPERTS)})
        with suppress(RecipeUnsupported):  # nothing else to quantize
            row["kept"] = opened_files(model, EngineRun(tiny_spec(kept), source, folder / "kept"))
    return row


def opened_files(model: PreTrainedModel, run: EngineRun) -> dict[str, Any]:
    """The KL of a job's report, and what transformers makes of its files: a KL and what it misses there, or
    its own words."""
    kl = run.report.candidates[0].kl
    try:
        windows = run.texts().evaluation.tokens
        opens, lost = opened_difference(model, run.folder("compressed-tensors"), windows)
    except Exception as fault:  # noqa: BLE001  # transformers' own words
        return {"kl": kl, "transformers": f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"}
    return {"kl": kl, "opens": opens, **({"lost": lost} if lost else {})}


def is_right(row: dict[str, Any]) -> bool:
    """Whether transformers opened the files with all of their weights."""
    return "opens" in row and "lost" not in row and abs(row["opens"] - row["kl"]) <= OPENS_NEAR * row["kl"]


@torch.no_grad()
def opened_difference(model: PreTrainedModel, folder: Path, windows: Tensor) -> tuple[float, list[str]]:
    """KL of what transformers opens from the original, in nats a token, and the names, without numbers, of
    the weights that it does not find."""
    opened, found = type(model).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    ours, theirs = (
        each(input_ids=windows, use_cache=False).logits.log_softmax(-1) for each in (opened.eval(), model)
    )
    lost = sorted({re.sub(r"\.\d+(?=\.)", "", name) for name in found["missing_keys"]})
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean()), lost


class Late(Exception):
    """The family takes too long."""


def late(*_: object) -> None:
    raise Late(f"more than {SECONDS} s")


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
    results: dict[str, Any] = {}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text("utf-8"))
    for model_type in arguments.types or sorted(known_types()):
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            results[model_type] = family_row(model_type, Path(folder))
        signal.alarm(0)
        print(model_type, json.dumps(results[model_type]), flush=True)  # noqa: T201  # a command
        arguments.results.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
