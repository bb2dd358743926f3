"""What transformers asks for before it opens our files is what our formats and our guide say."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.core.formats.registry import FORMATS, FormatName
from app.core.records.specs import Recipe
from tests.tiny_models import EngineRun, tiny_model, tiny_spec


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    root = tmp_path_factory.mktemp("needs")
    recipes = {
        symmetric: Recipe(method="rtn", group_size=32, symmetric=symmetric) for symmetric in (False, True)
    }
    model = tiny_model(root / "model")
    asymmetric = tiny_spec(recipes[False], formats=("awq", "compressed-tensors"))
    run = EngineRun(asymmetric, model, root / "asymmetric")
    symmetric = EngineRun(tiny_spec(recipes[True], formats=("gptq",)), model, root / "symmetric")
    symmetric.folder("gptq").rename(root / "asymmetric" / "gptq")
    return run


def folder_of(run: EngineRun, name: FormatName) -> Path:
    return run.work / "gptq" if name == "gptq" else run.folder(name)


def package(need: str) -> str:
    return need.partition(">=")[0]


def is_installed(need: str) -> bool:
    try:
        version(package(need))
    except PackageNotFoundError:
        return False
    return True


def opened(folder: Path) -> Callable[[], object]:
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].single_file is None])
def test_transformers_names_a_package_that_the_format_names(run: EngineRun, name: FormatName) -> None:
    needs = FORMATS[name].transformers_needs
    assert needs
    missing = [package(need) for need in needs if not is_installed(need)]
    load = opened(folder_of(run, name))
    if not missing:
        assert load() is not None
        return
    with pytest.raises(ImportError) as refusal:
        load()
    assert any(need in str(refusal.value) for need in missing), str(refusal.value)


@pytest.mark.parametrize("name", FORMATS)
def test_the_guide_names_the_same_packages(name: FormatName, repository: Path) -> None:
    guide = (repository / "docs" / "guides" / "recipes.md").read_text("utf-8")
    rows = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
    cell = rows[-1].split("|")[-2]  # of the table of loaders: transformers
    for need in FORMATS[name].transformers_needs:
        assert f"`{need}`" in cell
