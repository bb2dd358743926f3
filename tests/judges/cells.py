"""What the judges of files open: a cell for each format, bit width and symmetry that a format holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS, FormatName
from app.core.formats.schemes import SCHEMES, CacheName, SchemeName
from app.core.jobs.report import CandidateReport
from app.core.records.specs import Bits, CalibrationSpec, EvaluationSpec, Recipe
from tests.tiny_models import TEXTS, TOKENIZER, EngineRun, tiny_spec

MODEL = TOKENIZER  # the bundled model
METHODS = ("rtn", "awq", "gptq")
WINDOWS, WINDOW = 4, 128  # that are judged; and their length in tokens
LONG = 40_000  # characters of a text; enough for them


@dataclass(frozen=True, order=True)
class Cell:
    format: FormatName
    bits: int
    symmetric: bool
    group_size: int = 128
    method: str = "rtn"
    scheme: SchemeName = "wna16"
    cache: CacheName | Literal[""] = ""

    def __str__(self) -> str:
        cache = f" kv {self.cache}" if self.cache else ""
        if self.scheme != "wna16":
            return f"{self.format} {self.scheme} {self.method}{cache}"
        groups = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.format} W{self.bits} {groups} {self.zero_points} {self.method}{cache}"

    @property
    def numbers(self) -> str:
        """The scheme, or the grid of plain integers, and what the cache holds."""
        weights = f"{self.bits} bits, {self.zero_points}" if self.scheme == "wna16" else self.scheme
        return f"{weights}, cache {self.cache}" if self.cache else weights

    @property
    def zero_points(self) -> str:
        return "symmetric" if self.symmetric else "asymmetric"


def short_form() -> list[Cell]:
    """Every format x bits x symmetry, every other scheme and an FP8 cache, by plain rounding."""
    integers = [
        Cell(name, bits, symmetric)
        for name, file_format in FORMATS.items()
        for bits in get_args(Bits)
        for symmetric in (False, True)
        if file_format.refusal({Scheme(bits=bits, group_size=128, symmetric=symmetric)}) is None
    ]
    others = [Recipe(scheme=name) for name in SCHEMES if name != "wna16"]
    others.append(Recipe(group_size=128, kv_cache="fp8"))
    return [*integers, *(cell_of("compressed-tensors", recipe, "rtn") for recipe in others)]


def cell_of(format_name: FormatName, recipe: Recipe, method: str) -> Cell:
    assert recipe.group_size != "auto"
    return Cell(
        format_name, recipe.bits, recipe.symmetric, recipe.group_size, method, recipe.scheme,
        recipe.kv_cache or "",
    )  # fmt: skip


def long_form() -> list[Cell]:
    """Besides, of 4 bits, every group size and every method."""
    further = [
        Cell(cell.format, cell.bits, cell.symmetric, group_size, method)
        for cell in short_form()
        if cell.bits == 4 and cell.scheme == "wna16" and not cell.cache
        for group_size, method in (*((size, "rtn") for size in (32, 64, -1)), (128, "awq"), (64, "gptq"))
        if not (cell.format == "awq" and group_size == -1)
    ]
    return sorted([*short_form(), *further])


@dataclass(frozen=True)
class JudgedFiles:
    """A cell's files, and what the report says of them."""

    folder: Path
    windows: list[list[int]]  # token ids, on which it says so
    original_perplexity: float
    stated: CandidateReport


def quantized(cells: list[Cell], work: Path) -> dict[Cell, JudgedFiles]:
    """One job for the recipes that have the same formats."""
    artifacts = {}
    for number, (formats, recipes) in enumerate(jobs_of(cells)):
        folder = work / str(number)
        folder.mkdir(parents=True)
        run = EngineRun(tiny_spec(tuple(recipes), formats=formats, **texts()), MODEL, folder)
        report = run.report
        for output in run.finished.outputs:
            recipe = recipes[output.recipe_index]
            cell = cell_of(output.format, recipe, recipe.method)
            artifacts[cell] = JudgedFiles(
                run.work / output.folder,
                run.texts().evaluation.tokens.tolist(),
                report.original.perplexity,
                report.candidates[output.recipe_index],
            )
    return artifacts


def jobs_of(cells: list[Cell]) -> Iterator[tuple[tuple[FormatName, ...], list[Recipe]]]:
    formats: dict[Recipe, list[FormatName]] = defaultdict(list)
    for cell in cells:
        fields = {
            "bits": cell.bits, "symmetric": cell.symmetric, "group_size": cell.group_size,
            "scheme": cell.scheme, "kv_cache": cell.cache or None,
        }  # fmt: skip
        formats[Recipe.model_validate({"method": cell.method, **fields})].append(cell.format)
    jobs: dict[tuple[FormatName, ...], list[Recipe]] = defaultdict(list)
    for recipe, names in formats.items():
        jobs[tuple(names)].append(recipe)
    yield from jobs.items()


def texts() -> dict[str, Any]:
    valid, test = ((TEXTS / f"{name}.txt").read_text("utf-8")[:LONG] for name in ("valid", "test"))
    return {
        "calibration": CalibrationSpec(texts=(valid,), num_samples=16, sequence_length=WINDOW),
        "evaluation": EvaluationSpec(texts=(test,), num_samples=WINDOWS),
    }
