from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from app.core.records.specs import CalibrationSpec, JobSpec
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache, fetch_text, fetch_texts, text_digest


def nothing(_: int) -> None:
    return None


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
        CalibrationSpec(dataset="self"),
        CalibrationSpec(texts=("x",)),
        CalibrationSpec(texts=("y",)),
    ]
    for spec in specs:
        assert fetch_text(spec, Settings(), tmp_path / "text", nothing) is None
    assert len({text_digest(spec, None, nothing) for spec in specs}) == 5


def test_a_text_of_this_host_is_read_in_place_where_that_is_asked(tmp_path: Path) -> None:
    settings = Settings(model_roots=(tmp_path,))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    spec = JobSpec(model="org/name", calibration=CalibrationSpec(dataset=(tmp_path / "a.jsonl").as_uri()))
    copied, read = (
        fetch_texts(spec, settings, tmp_path / "work", nothing, in_place=way) for way in (False, True)
    )
    assert (copied.calibration, read.calibration) == (
        tmp_path / "work/calibration.jsonl",
        tmp_path / "a.jsonl",
    )
    assert copied.model_copy(update={"calibration": read.calibration}) == read
