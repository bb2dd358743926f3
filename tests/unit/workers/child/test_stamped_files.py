from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from workers.child.stamped_files import is_stamped, write_stamped


def test_a_file_that_was_cut_short_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    write_stamped(path, {"a": torch.zeros(100)}, "work")
    assert is_stamped(path, "work")
    assert not is_stamped(path, "other work")
    path.write_bytes(path.read_bytes()[:50])
    assert not is_stamped(path, "work")


def test_a_file_that_the_system_does_not_open_is_not_taken_for_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise SafetensorError("Error: Too many open files (os error 24)")

    path = tmp_path / "layer.safetensors"
    write_stamped(path, {"a": torch.zeros(100)}, "work")
    monkeypatch.setattr("workers.child.stamped_files.safe_open", refused)
    with pytest.raises(SafetensorError, match="Too many open files"):
        is_stamped(path, "work")
