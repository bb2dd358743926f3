"""Models in an S3-compatible store, against a server process."""

from __future__ import annotations

from pathlib import Path

import obstore
import pytest

from app.core.errors import ModelRefused
from app.core.jobs.submission import check_submission
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from app.core.sources.adapter_config import CONFIG
from app.core.sources.adapter_model import WEIGHTS
from app.core.sources.fetching import ModelCache
from app.core.sources.file_digest import file_sha256
from app.core.sources.model_source import inspect_model, model_digest, open_model
from app.core.sources.text_source import open_text
from app.core.storage.object_store import open_bucket
from tests.adapters import GOLDEN
from tests.integration.conftest import s3_client
from workers.modeling.checkpoint import Checkpoint

CHANGED = "model.layers.5.mlp.down_proj.weight"


@pytest.fixture
def bucket(any_s3_endpoint: str, example_model: Path) -> str:
    """A bucket that holds the bundled model below a prefix, and a text."""
    s3_client(any_s3_endpoint).create_bucket(Bucket="models")
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


def test_an_adapter_is_fetched_beside_the_model(bucket: str, example_model: Path, tmp_path: Path) -> None:
    """Its two files alone; a job with another one starts from other weights."""
    store = open_bucket("models")
    for path in (GOLDEN / "bundled").iterdir():
        obstore.put(store, f"tuned/{path.name}", path)
    spec = JobSpec(model=bucket, adapter="s3://models/tuned")
    checked = check_submission(spec, Settings())
    sizes = {name: (GOLDEN / "bundled" / name).stat().st_size for name in (CONFIG, WEIGHTS)}
    plain = check_submission(JobSpec(model=bucket), Settings())
    assert checked.download_bytes - plain.download_bytes == sum(sizes.values())
    with ModelCache(tmp_path / "cache", Settings()) as cache:
        model = cache.fetch(bucket, nothing, "s3://models/tuned")
        assert model.adapter is not None
        assert {path.name: path.stat().st_size for path in model.adapter.folder.iterdir()} == sizes
        assert model.merged_digest != model.digest == cache.fetch(bucket, nothing).digest
    assert Checkpoint.original(model.folder, model.adapter.folder).tensor(CHANGED).ndim == 2


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
