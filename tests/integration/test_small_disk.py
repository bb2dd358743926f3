"""`nibble quantize` where the disk is too small for what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from tests.small_disk import small_disk


def test_a_full_disk_is_told_in_words_of_the_terminal(
    tmp_path: Path, example_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "rtn", "--num-samples", "2", "--sequence-length", "32", "--eval-samples", "2"]
    with small_disk(tmp_path / "disk", 3 * 1024**2) as disk:
        with pytest.raises(SystemExit) as ended:
            main(["quantize", str(example_model), "-o", str(disk / "out"), *options, "--json"])
        left = list(disk.iterdir())
    error = json.loads(capfd.readouterr().err.splitlines()[-1])["error"]
    assert ended.value.code == 1
    assert error["code"] == "worker_disk"
    assert error["message"].startswith("the disk is full: ")
    assert error["remedy"] == f"free space in {disk}"
    assert left == []


def test_a_folder_that_may_not_be_written_is_told_too(
    tmp_path: Path, example_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(example_model), "-o", str(tmp_path / "file" / "sub" / "out"), "--json"])
    error = json.loads(capfd.readouterr().err.splitlines()[-1])["error"]
    assert (ended.value.code, error["code"]) == (1, "worker_disk")
    assert "Not a directory" in error["message"]
    assert str(tmp_path / "file") in error["remedy"]
