"""Cached folders on a real file system, by several holders of their locks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.core.storage.cached_folders import CachedFolders

SIZES = {"a/weights": 300, "config": 2, "weights": 500}


class StopNow(Exception):
    pass


class Source:
    """Files to download; after `most` of them it is stopped."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.downloaded: list[str] = []

    def download(self, path: str, part: Path) -> None:
        part.write_bytes(b"x")
        if len(self.downloaded) == self.most:
            raise StopNow
        self.downloaded.append(path)
        part.write_bytes(bytes(SIZES[path]))


def no_check() -> None:
    """Nobody asks to stop."""


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_stopped_download_keeps_finished_files_and_shows_no_folder(tmp_path: Path) -> None:
    folders, stopped, second = CachedFolders(tmp_path), Source(most=2), Source()
    with pytest.raises(StopNow):
        folders.fill("model", SIZES, stopped.download)
    assert names(tmp_path) == ["model.partial"]
    assert folders.fill("model", SIZES, second.download) == tmp_path / "model"
    assert stopped.downloaded + second.downloaded == sorted(SIZES)
    assert names(tmp_path) == ["model"]
    files = {path.relative_to(tmp_path / "model").as_posix(): path.stat().st_size
             for path in (tmp_path / "model").rglob("*") if path.is_file()}  # fmt: skip
    assert files == SIZES


def test_what_is_whole_is_not_downloaded_and_a_cut_file_alone_is(tmp_path: Path) -> None:
    folders, source = CachedFolders(tmp_path), Source()
    folder = folders.fill("model", SIZES, source.download)
    folders.fill("model", SIZES, source.download)
    assert source.downloaded == sorted(SIZES)
    (folder / "weights").write_bytes(b"cut")
    (folder / "config").unlink()
    with folders.in_use("model"):
        folders.fill("model", SIZES, source.download)
    assert source.downloaded[3:] == ["config", "weights"]
    assert names(tmp_path) == ["model"]


def test_one_at_a_time_downloads(tmp_path: Path) -> None:
    folders = CachedFolders(tmp_path / "cache")
    waited = threading.Event()
    order = []

    def second() -> None:
        with folders.locked("model", waited.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with folders.locked("model", no_check), folders.locked("other", no_check):
        thread.start()
        assert waited.wait(30)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_who_waits_for_a_download_can_be_stopped(tmp_path: Path) -> None:
    def stop() -> None:
        raise StopNow

    folders = CachedFolders(tmp_path)
    with folders.locked("model", no_check), pytest.raises(StopNow), folders.locked("model", stop):
        pytest.fail("it was locked twice")


def cached(folders: CachedFolders, name: str, used_at: float) -> None:
    folder = folders.root / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(100))
    use = folders.root / f"{name.removesuffix('.partial')}.use"
    use.touch()
    os.utime(use, (used_at, used_at))


def test_what_was_used_least_recently_goes_first_and_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = CachedFolders(tmp_path / "cache", 300)
    for name, used_at in (("new", 30.0), ("old.partial", 10.0), ("held", 5.0), ("middle", 20.0)):
        cached(cache, name, used_at)
    assert CachedFolders(cache.root, 0).make_room(100) == []
    assert CachedFolders(cache.root, 500).make_room(100) == []
    with cache.in_use("held"):
        os.utime(cache.root / "held.use", (5.0, 5.0))
        assert cache.make_room(100) == ["old.partial", "middle"]
        assert cache.make_room(1000) == ["new"]
    assert names(cache.root) == ["held"]
    with cache.in_use("held"):
        pass
    cached(cache, "later", 1e9)
    assert cache.make_room(200) == ["later"]  # held was used this very moment


def test_a_download_makes_room_and_stays_itself(tmp_path: Path) -> None:
    cache = CachedFolders(tmp_path, 1000)
    for name in ("first", "second", "third"):
        with cache.locked(name, no_check):
            cache.fill(name, SIZES, Source().download)
        assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["model", "model.partial"])
def test_whoever_uses_a_folder_keeps_every_process_from_removing_it(name: str, tmp_path: Path) -> None:
    folders = CachedFolders(tmp_path)
    (tmp_path / name).mkdir()
    program = (
        "import sys; from pathlib import Path; from app.core.storage.cached_folders import CachedFolders\n"
        f"print(CachedFolders(Path({str(tmp_path)!r})).remove({name!r}))"
    )

    def removed_elsewhere() -> str:
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[5])},
        ).stdout.strip()  # fmt: skip

    with ExitStack() as users:
        for _ in range(2):
            users.enter_context(folders.in_use("model"))
        assert [removed_elsewhere(), str(folders.remove(name))] == ["False", "False"]
    assert [removed_elsewhere(), str(folders.remove(name))] == ["True", "False"]
    assert names(tmp_path) == []
