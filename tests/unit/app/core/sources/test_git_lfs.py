"""A clone without git-lfs: large files are pointers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from app.core.errors import ModelRefused
from app.core.sources.local_model import LocalModel
from app.core.sources.model_headers import inspect_model
from tests.tiny_models import TOKENIZER

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 26214400\n" % (b"4d" * 32)
LARGE = ["model.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"]
SMALL = [
    *("config.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"),
    *("special_tokens_map.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja"),
    "additional_chat_templates/tool_use.jinja",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOKENIZER, tmp_path / "model"))


@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_a_pointer_in_place_of_a_file_is_named_with_what_to_do(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(POINTER)
    with pytest.raises(ModelRefused, match=f"{name} is a git-lfs pointer, not the file itself") as refusal:
        inspect_model(LocalModel(folder, [folder]))
    assert refusal.value.code == "git_lfs_pointer"
    assert "git lfs pull" in refusal.value.remedy


def test_small_files_that_are_no_pointers_are_accepted(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "chat_template.jinja").write_text("")
    assert {"merges.txt", "chat_template.jinja"} <= inspect_model(LocalModel(folder, [folder])).files.keys()


def test_other_files_may_be_pointers(folder: Path) -> None:
    (folder / "picture.png").write_bytes(POINTER)
    assert "picture.png" not in inspect_model(LocalModel(folder, [folder])).files
