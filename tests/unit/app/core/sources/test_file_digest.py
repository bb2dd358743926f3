"""The SHA-256 of files, and that hashing one can be stopped."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from app.core.sources.file_digest import CHUNK_BYTES, file_sha256


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_the_digest_is_that_of_all_bytes(size: int, tmp_path: Path) -> None:
    content = bytes(index % 251 for index in range(min(size, 1000))) * (size // 1000 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    checks: list[None] = []
    assert file_sha256(path, lambda: checks.append(None)) == hashlib.sha256(content[:size]).hexdigest()
    assert file_sha256(path) == hashlib.sha256(content[:size]).hexdigest()
    assert len(checks) == -(-size // CHUNK_BYTES)


def test_a_check_that_raises_stops_within_the_file(tmp_path: Path) -> None:
    path, checks = tmp_path / "file", 0
    path.write_bytes(b"x" * (3 * CHUNK_BYTES))

    def check() -> None:
        nonlocal checks
        checks += 1
        raise InterruptedError

    with pytest.raises(InterruptedError):
        file_sha256(path, check)
    assert checks == 1
