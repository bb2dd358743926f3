from __future__ import annotations

import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from app.core.records.specs import CalibrationSpec
from app.core.settings import Settings
from app.core.sources.fetching import (
    ModelCache,
    download_model,
    exclusive,
    fetch_text,
    make_room,
    text_digest,
)
from app.core.sources.model_source import LocalModel, inspect_model


def nothing(_: int) -> None:
    return None


class StopNow(Exception):
    pass


@pytest.fixture
def cache(tmp_path: Path, example_model: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache", Settings(model_roots=(example_model, tmp_path)))


def test_a_local_model_is_read_in_place(cache: ModelCache, example_model: Path) -> None:
    model = cache.fetch(example_model.as_uri(), nothing)
    assert model.folder == example_model
    assert cache.fetch(example_model.as_uri(), nothing) == model


def test_the_digest_follows_the_content(cache: ModelCache, example_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(example_model, copy)
    before = cache.fetch(copy.as_uri(), nothing)
    assert before.digest == cache.fetch(example_model.as_uri(), nothing).digest
    (copy / "README.md").write_text("other words")
    assert cache.fetch(copy.as_uri(), nothing).digest == before.digest
    (copy / "generation_config.json").write_text("{}")
    assert cache.fetch(copy.as_uri(), nothing).digest != before.digest


def test_a_damaged_note_of_digests_is_made_again(
    cache: ModelCache, example_model: Path, tmp_path: Path
) -> None:
    before = cache.fetch(example_model.as_uri(), nothing)
    for note in (tmp_path / "cache").glob("*.json"):
        note.write_text("{")
    assert cache.fetch(example_model.as_uri(), nothing) == before


def test_a_stopped_download_keeps_finished_files_and_shows_no_folder(
    example_model: Path, tmp_path: Path
) -> None:
    files = LocalModel(example_model, [example_model])
    sizes = inspect_model(files).files
    seen = 0

    def stop_after_some(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 10_000_000:
            raise StopNow

    with pytest.raises(StopNow):
        download_model(files, sizes, tmp_path / "model", stop_after_some)
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "model.partial" / "config.json").exists()
    download_model(files, sizes, tmp_path / "model", nothing)
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(sizes)
    assert not (tmp_path / "model.partial").exists()


def test_one_worker_at_a_time_fetches_a_model(tmp_path: Path) -> None:
    waited = threading.Event()
    order = []

    def second() -> None:
        with exclusive(tmp_path / "lock", lambda _: waited.set()):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive(tmp_path / "lock", nothing):
        thread.start()
        assert waited.wait(30)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_texts_are_copied_and_named_by_content(tmp_path: Path) -> None:
    settings = Settings(model_roots=(tmp_path,))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    digests = []
    for name in ("a", "b"):
        spec = CalibrationSpec(dataset=(tmp_path / f"{name}.jsonl").as_uri())
        copy = fetch_text(spec, settings, tmp_path / "work" / name, nothing)
        assert copy == tmp_path / "work" / f"{name}.jsonl"
        digests.append(text_digest(spec, copy, nothing))
    assert digests[0] == digests[1]


def test_bundled_and_inline_texts_need_no_file(tmp_path: Path) -> None:
    specs = [
        CalibrationSpec(),
        CalibrationSpec(dataset="builtin:other"),
        CalibrationSpec(texts=("x",)),
        CalibrationSpec(texts=("y",)),
    ]
    for spec in specs:
        assert fetch_text(spec, Settings(), tmp_path / "text", nothing) is None
    assert len({text_digest(spec, None, nothing) for spec in specs}) == 4


def kept_model(cache: Path, name: str, size: int, used_at: float) -> Path:
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(size))
    (cache / f"{name}.use").touch()
    os.utime(cache / f"{name}.use", (used_at, used_at))
    return folder


def test_the_models_used_least_recently_go_first_and_those_in_use_stay(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, used_at in (("new", 30.0), ("old", 10.0), ("held", 5.0), ("middle", 20.0)):
        kept_model(cache, name, 100, used_at)
    assert make_room(cache, 100, 0) == []
    assert make_room(cache, 100, 500) == []
    with (cache / "held.use").open() as use:
        fcntl.flock(use, fcntl.LOCK_SH)
        assert make_room(cache, 100, 300) == ["old", "middle"]
        assert make_room(cache, 1000, 300) == ["new"]
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == ["held"]
