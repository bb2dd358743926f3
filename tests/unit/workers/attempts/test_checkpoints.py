from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.core.child.assignment import CHECKPOINTS, Checkpointed
from app.core.errors import Unavailable
from app.core.records.ids import new_id
from app.core.records.job import Job
from app.core.records.specs import JobSpec
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import checkpoint_prefix
from workers.attempts.checkpoints import CheckpointMirror


@pytest.fixture
def job() -> Job:
    spec = JobSpec(model="org/name")
    return Job(id=new_id("job"), tenant="default", spec=spec, created_at=datetime.now(UTC))


class FlakyStore(ObjectStore):
    """An object store that fails its next `failures` puts."""

    failures = 0

    def put(self, key: str, content: object) -> None:
        if self.failures:
            self.failures -= 1
            raise Unavailable("storage is away")
        super().put(key, content)  # type: ignore[arg-type]


@pytest.fixture
def objects() -> FlakyStore:
    return FlakyStore("memory:///")


def mirror_of(objects: ObjectStore, job: Job, folder: Path) -> CheckpointMirror:
    folder.mkdir(exist_ok=True)
    return CheckpointMirror(objects, job, "k", folder)


def write(folder: Path, key: str) -> None:
    (folder / CHECKPOINTS / key).write_text(key)


def nothing() -> None:
    return None


def test_the_next_attempt_gets_what_was_put(objects: FlakyStore, job: Job, tmp_path: Path) -> None:
    first = mirror_of(objects, job, tmp_path / "1")
    for key in ("layer-0", "states-1"):
        write(tmp_path / "1", key)
        first.put(Checkpointed(key=key))
    write(tmp_path / "1", "states-2")
    first.put(Checkpointed(key="states-2", replaces="states-1"))
    assert mirror_of(objects, job, tmp_path / "2").restore(nothing) == ["layer-0", "states-2"]
    assert (tmp_path / "2" / CHECKPOINTS / "states-2").read_text() == "states-2"


def test_a_failed_put_goes_with_the_next_one(objects: FlakyStore, job: Job, tmp_path: Path) -> None:
    mirror = mirror_of(objects, job, tmp_path / "1")
    write(tmp_path / "1", "layer-0")
    objects.failures = 1
    with pytest.raises(Unavailable):
        mirror.put(Checkpointed(key="layer-0"))
    write(tmp_path / "1", "layer-1")
    mirror.put(Checkpointed(key="layer-1"))
    assert mirror_of(objects, job, tmp_path / "2").restore(nothing) == ["layer-0", "layer-1"]


def test_a_replaced_file_is_kept_until_its_successor_is_stored(
    objects: FlakyStore, job: Job, tmp_path: Path
) -> None:
    """The child has dropped states-2 before it could be put: states-1 must stay until states-3 is there."""
    mirror = mirror_of(objects, job, tmp_path / "1")
    write(tmp_path / "1", "states-1")
    mirror.put(Checkpointed(key="states-1"))
    mirror.put(Checkpointed(key="states-2", replaces="states-1"))
    assert mirror_of(objects, job, tmp_path / "2").restore(nothing) == ["states-1"]
    write(tmp_path / "1", "states-3")
    mirror.put(Checkpointed(key="states-3", replaces="states-2"))
    assert mirror_of(objects, job, tmp_path / "3").restore(nothing) == ["states-3"]


@pytest.mark.parametrize("damage", [b"", b"short", b"LAYER-1"], ids=["empty", "cut", "changed"])
def test_a_stored_checkpoint_that_differs_from_its_digest_is_not_used(
    objects: FlakyStore, job: Job, tmp_path: Path, damage: bytes
) -> None:
    first = mirror_of(objects, job, tmp_path / "1")
    for key in ("layer-0", "layer-1"):
        write(tmp_path / "1", key)
        first.put(Checkpointed(key=key))
    stored = f"{checkpoint_prefix(job.id)}/k/layer-1"
    objects.put(stored, damage + objects.get(stored)[len(damage) :] if len(damage) == 7 else damage)
    second = mirror_of(objects, job, tmp_path / "2")
    assert second.restore(nothing) == ["layer-0"]
    assert second.damaged == ["layer-1"]
    assert [path.name for path in (tmp_path / "2" / CHECKPOINTS).iterdir()] == ["layer-0"]


def test_an_empty_checkpoint_is_one(objects: FlakyStore, job: Job, tmp_path: Path) -> None:
    mirror = mirror_of(objects, job, tmp_path / "1")
    (tmp_path / "1" / CHECKPOINTS / "mark").touch()
    mirror.put(Checkpointed(key="mark"))
    assert mirror_of(objects, job, tmp_path / "2").restore(nothing) == ["mark"]
    assert (tmp_path / "2" / CHECKPOINTS / "mark").read_bytes() == b""
