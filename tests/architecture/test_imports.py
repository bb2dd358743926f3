"""Import rules that a static contract can't see: what really gets loaded, and what the engine may take."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "tokenizers", "workers", "kernels")
BUILD_APP = """
import json, sys
from app.core.settings import Settings
from app.main import create_app
create_app(Settings())
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
BUILD_CLI = """
import json, sys
import typer
from app.cli import build
root = typer.main.get_command(build())
for name in root.commands:
    root.commands[name]  # imported when it is asked for
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
# What tensors-in, tensors-out code may know of the service: contracts and local files, no stores.
ENGINE_MAY_IMPORT = frozenset(
    f"app.core.{name}"
    for name in (
        "child.assignment", "errors", "formats.awq", "formats.compressed_tensors",
        "formats.file_format", "formats.gguf", "formats.registry", "formats.schemes",
        "jobs.report",
        "planning.architectures", "planning.cached_attention", "planning.family", "planning.fused_experts",
        "planning.plan",
        "records.artifact", "records.job", "records.specs",
        "sources.adapter_model", "sources.file_choice", "sources.gguf_header", "sources.json_file",
        "sources.local_model", "sources.model_headers", "sources.safetensors_header", "sources.text_content",
        "sources.text_shapes", "faults.system_faults",
    )
)  # fmt: skip
ENGINE_PARTS = ("quantization", "modeling", "formats", "texts")


def loaded_modules(program: str, tmp_path: Path) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("program", [BUILD_APP, BUILD_CLI], ids=["api", "cli"])
def test_the_service_loads_nothing_heavy(program: str, tmp_path: Path) -> None:
    assert loaded_modules(program, tmp_path).isdisjoint(HEAVY)


def test_help_loads_no_web_framework(tmp_path: Path) -> None:
    assert loaded_modules(BUILD_CLI, tmp_path).isdisjoint({"fastapi", "uvicorn", "rq", "redis"})


LOADED_FOR_HELP = """
import contextlib, io, json, sys
from app.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_help_of_all_loads_no_command(tmp_path: Path) -> None:
    assert loaded_modules(LOADED_FOR_HELP, tmp_path).isdisjoint({"rich", "pydantic", "httpx", "fastapi"})


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("part", ENGINE_PARTS)
def test_the_engine_knows_only_the_contracts(part: str, repository: Path) -> None:
    files = sorted((repository / "workers" / part).rglob("*.py"))
    assert files
    foreign = {
        f"{path.relative_to(repository)}: {name}"
        for path in files
        for name in imported_modules(path)
        if name.startswith("app.") and name not in ENGINE_MAY_IMPORT
    }
    assert not foreign


def test_no_two_modules_import_each_other(repository: Path) -> None:
    """Imports for types alone count, too: each part must be readable without the one above it."""
    files = [path for part in ("app", "workers", "kernels") for path in (repository / part).rglob("*.py")]
    names = {path: ".".join(path.relative_to(repository).with_suffix("").parts) for path in files}
    imports = {names[path]: imported_modules(path) for path in files}
    mutual = {
        f"{name} <-> {other}"
        for name, found in imports.items()
        for other in found
        if name < other and name in imports.get(other, ())
    }
    assert not mutual


def test_no_library_named_kernels_is_installed() -> None:
    """transformers would import it in place of ours (docs/decisions.md)."""
    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    assert "kernels" not in names


def test_transformers_does_not_take_our_kernels_for_the_library() -> None:
    program = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "False"
