"""An estimate adds up: in the API's answer, and as the terminal prints it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.commands.show import show_estimate
from app.core.jobs.estimate import Estimate, estimate
from app.core.jobs.submission import CheckedSubmission
from app.core.planning.device_profile import NOMINAL, DeviceKind, profile_of
from app.core.planning.plan import plan_job
from app.core.records.specs import JobSpec
from app.core.sources.model_source import inspect_model, open_model
from tests.tiny_models import tiny_model

RECIPES: dict[str, dict[str, Any]] = {
    "usual": {"recipe": {"group_size": 32}},
    "rounding": {"recipe": {"method": "rtn", "group_size": 32}, "formats": ["awq", "compressed-tensors"]},
    "gptq": {"recipe": {"method": "gptq", "group_size": 32}},
    "learning": {"recipe": {"method": "omniquant", "bits": 2, "group_size": 32}},
    "a list": {"recipe": [{"group_size": 32}, {"method": "rtn", "group_size": 32}, {"group_size": 64}],
               "formats": ["compressed-tensors"]},
    "a target, little text": {"recipe": {"group_size": 32}, "target": {"max_kl": 0.1},
                              "calibration": {"num_samples": 3}, "evaluation": {"num_samples": 1}},
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "many layers": ("qwen3", {"num_hidden_layers": 7}),
    "large vocabulary": ("llama", {"vocab_size": 50_000, "tie_word_embeddings": False}),
    "experts": ("mixtral", {"num_local_experts": 4}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny_model(root / name.replace(" ", "-"), kind, **changes)
        for name, (kind, changes) in MODELS.items()
    }


def estimated(model: Path, body: dict[str, Any], device: DeviceKind, download_bytes: int = 0) -> Estimate:
    headers = inspect_model(open_model(model.as_uri(), model_roots=(model.parent,)))
    spec = JobSpec.model_validate({"model": "m", **body})
    plan = plan_job(spec, headers.config, headers.tensors)
    checked = CheckedSubmission(spec=spec, plan=plan, download_bytes=download_bytes, fingerprint="")
    profile = profile_of(device, {"elementwise": 3.21e9}) if device == "cpu" else NOMINAL[device]
    return estimate(checked, device, profile)


def printed(document: Estimate) -> list[dict[str, float]]:
    """The tables of seconds in what the terminal prints: by the row's first column."""
    out = io.StringIO()
    show_estimate(Console(file=out, width=300), document.model_dump(mode="json"))
    tables: list[dict[str, float]] = []
    for line in out.getvalue().splitlines():
        cells = [cell.strip() for cell in re.split(r"[│┃]|\s{2,}", line) if cell.strip()]
        if "seconds" in cells:
            tables.append({})
        elif tables and len(cells) > 1 and "total" not in tables[-1]:
            tables[-1][f"{len(tables[-1])} {cells[0]}" if cells[0] != "total" else "total"] = float(cells[1])
    return tables


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("body", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_an_estimate_is_the_sum_of_its_rows(
    folders: dict[str, Path], model: str, body: dict[str, Any], device: DeviceKind
) -> None:
    answer = estimated(folders[model], body, device, download_bytes=1_234_567)
    assert sum(answer.stages.values()) == pytest.approx(answer.time_s, abs=1e-6)
    own = sum(candidate.time_s for candidate in answer.candidates)
    assert answer.shared_s + own == pytest.approx(answer.time_s, abs=1e-6)
    assert answer.shared_s > 0
    for table in printed(answer):
        total = table.pop("total")
        assert len(table) > 1
        assert sum(table.values()) == pytest.approx(total, abs=1e-6)
        assert total == answer.time_s
    assert len(printed(answer)) == 2


def test_every_step_of_a_job_has_a_row(folders: dict[str, Path]) -> None:
    answer = estimated(folders["llama"], RECIPES["usual"], "cpu")
    assert list(answer.stages) == [
        "starting", "fetching", "calibrating", "searching", "packing", "verifying", "evaluating",
        "publishing",
    ]  # fmt: skip


def test_a_download_takes_time_and_says_what_is_assumed(folders: dict[str, Path]) -> None:
    here, remote = (estimated(folders["llama"], RECIPES["usual"], "cpu", size) for size in (0, 10**9))
    assert remote.stages["fetching"] == pytest.approx(here.stages["fetching"] + 20, abs=0.2)
    assert remote.disk_bytes == here.disk_bytes + 10**9
    assert any("fetching assumes 50 MB/s" in note for note in remote.notes)
    assert not any("fetching" in note for note in here.notes)


def test_tasks_of_unknown_size_are_named(folders: dict[str, Path]) -> None:
    tasks = {"tasks": ["builtin:agreement", "arc_easy", "mmlu"]}
    answer = estimated(folders["llama"], {**RECIPES["usual"], "evaluation": tasks}, "cpu")
    assert any("the time of arc_easy, mmlu is not included" in note for note in answer.notes)
