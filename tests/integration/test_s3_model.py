"""Models in an S3-compatible store, against a server process."""

from __future__ import annotations

from pathlib import Path

import httpx
import obstore
import pytest

from app.core.errors import ModelRefused
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from app.core.sources.file_digest import file_sha256
from app.core.sources.model_source import inspect_model, model_digest, open_model
from app.core.sources.text_source import open_text
from app.core.storage.object_store import open_bucket


@pytest.fixture
def bucket(s3_endpoint: str, example_model: Path) -> str:
    """A bucket that holds the bundled model below a prefix, and a text."""
    assert httpx.put(f"{s3_endpoint}/models").status_code == 200
    store = open_bucket("models")
    for path in example_model.iterdir():
        obstore.put(store, f"small/model/{path.name}", path)
    obstore.put(store, "small/text.jsonl", b'{"text": "x"}\n')
    return "s3://models/small/model"


def nothing(_: int) -> None:
    return None


def test_an_s3_model_is_inspected_and_fetched(bucket: str, example_model: Path, tmp_path: Path) -> None:
    headers = inspect_model(open_model(bucket, model_roots=()))
    local = inspect_model(open_model(example_model.as_uri(), model_roots=[example_model]))
    assert headers == local
    with ModelCache(tmp_path / "cache", Settings()) as cache:
        model = cache.fetch(bucket, nothing)
    hashes = {name: file_sha256(example_model / name) for name in local.files}
    assert model.digest == model_digest(hashes)
    assert {path.name for path in model.folder.iterdir()} == set(local.files)


def test_a_replaced_object_is_fetched_again(bucket: str, tmp_path: Path) -> None:
    with ModelCache(tmp_path / "cache", Settings()) as cache:
        before = cache.fetch(bucket, nothing)
        obstore.put(open_bucket("models"), "small/model/generation_config.json", b"{}")
        after = cache.fetch(bucket, nothing)
    assert after.digest != before.digest
    assert after.folder != before.folder


def test_stray_objects_are_neither_fetched_nor_in_the_digest(bucket: str, tmp_path: Path) -> None:
    stray = ("model_old.safetensors", "adapter_model.safetensors", "modeling_x.py", "original/x.pth")
    with ModelCache(tmp_path / "cache", Settings()) as cache:
        before = cache.fetch(bucket, nothing)
        for name in stray:
            obstore.put(open_bucket("models"), f"small/model/{name}", b"x")
        after = cache.fetch(bucket, nothing)
        obstore.put(open_bucket("models"), "small/model/additional_chat_templates/x.jinja", b"x")
        with_template = cache.fetch(bucket, nothing)
    assert (before.notes, after.digest) == ((), before.digest)
    assert all(name in after.notes[0] for name in stray)
    assert not [path for path in after.folder.rglob("*") if path.name in stray or path.suffix == ".pth"]
    assert with_template.digest != before.digest
    assert (with_template.folder / "additional_chat_templates" / "x.jinja").exists()


def test_a_missing_prefix_or_bucket_is_refused(bucket: str) -> None:
    for reference in ("s3://models/nothing", "s3://no-such-bucket/x"):
        with pytest.raises(ModelRefused) as refusal:
            inspect_model(open_model(reference, model_roots=()))
        assert refusal.value.code == "model_not_found"


def test_an_s3_text_is_read(bucket: str) -> None:
    text = open_text("s3://models/small/text.jsonl", model_roots=())
    assert text.files.read(text.path, 0, text.size) == b'{"text": "x"}\n'
