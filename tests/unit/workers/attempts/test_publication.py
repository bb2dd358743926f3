from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.core.child.assignment import Finished, OutputFolder
from app.core.errors import JobFault, Unavailable
from app.core.records.ids import artifact_id, new_id
from app.core.records.job import Job
from app.core.records.specs import JobSpec
from app.core.sources.fetching import FetchedModel
from app.core.storage.object_store import ObjectStore
from app.core.storage.published import published_before, read_manifest
from app.core.storage.storage_keys import report_key
from workers.attempts.publication import Publication

MODEL = FetchedModel(folder=Path("/models/any"), name="any", digest="d" * 64, notes=())


@pytest.fixture
def job() -> Job:
    spec = JobSpec(model="org/name", formats=("awq", "compressed-tensors"))
    return Job(id=new_id("job"), tenant="acme", spec=spec, created_at=datetime.now(UTC), attempt=2)


@pytest.fixture
def objects() -> ObjectStore:
    return ObjectStore("memory:///")


@pytest.fixture
def finished(job: Job, tmp_path: Path) -> Finished:
    outputs = []
    for name in job.spec.formats:
        folder = tmp_path / "output" / name
        (folder / "deep").mkdir(parents=True)
        (folder / "config.json").write_text(name)
        (folder / "deep" / "x.txt").write_text("x")
        outputs.append(OutputFolder(recipe_index=0, format=name, folder=f"output/{name}", summary={}))
    (tmp_path / "report.json").write_text("{}")
    return Finished(report="report.json", outputs=tuple(outputs))


def nothing() -> None:
    return None


class StopNow(Exception):
    pass


def stop() -> None:
    raise StopNow


def publication(objects: ObjectStore, job: Job, folder: Path) -> Publication:
    return Publication(objects, job, model=MODEL, work_folder=folder)


def test_files_report_and_manifests_are_written(
    objects: ObjectStore, job: Job, finished: Finished, tmp_path: Path
) -> None:
    assert published_before(objects, job) is None
    ids = publication(objects, job, tmp_path).publish(finished, check=nothing, before_commit=nothing)
    assert ids == tuple(artifact_id(job.id, 0, name) for name in job.spec.formats)
    assert published_before(objects, job) == ids
    manifest = read_manifest(objects, ids[0])
    assert manifest is not None
    assert (manifest.tenant, manifest.prefix, manifest.format) == ("acme", "attempt-2", "awq")
    stored = {file.path: file.sha256 for file in manifest.files}
    assert stored["config.json"] == hashlib.sha256(b"awq").hexdigest()
    assert objects.get(f"artifacts/{ids[0]}/attempt-2/deep/x.txt") == b"x"
    assert objects.get(report_key(job.id)) == b"{}"


def test_a_stop_before_the_commit_leaves_no_files(
    objects: ObjectStore, job: Job, finished: Finished, tmp_path: Path
) -> None:
    with pytest.raises(StopNow):
        publication(objects, job, tmp_path).publish(finished, check=nothing, before_commit=stop)
    assert objects.list("artifacts") == []


def test_the_attempt_that_comes_second_removes_its_files(
    objects: ObjectStore, job: Job, finished: Finished, tmp_path: Path
) -> None:
    first = job.model_copy(update={"attempt": 1})
    ids = publication(objects, first, tmp_path).publish(finished, check=nothing, before_commit=nothing)
    before = objects.list("artifacts")
    again = publication(objects, job, tmp_path).publish(finished, check=nothing, before_commit=nothing)
    assert again == ids
    assert objects.list("artifacts") == before


class Undeletable(ObjectStore):
    """A storage that neither lists nor deletes."""

    def delete_prefix(self, prefix: str) -> None:
        raise Unavailable(f"no {prefix}", code="storage_unavailable")

    def list_folders(self, prefix: str) -> list[str]:
        raise Unavailable(f"no {prefix}", code="storage_unavailable")


def test_what_cannot_be_cleaned_up_changes_nothing_about_the_job(
    job: Job, finished: Finished, tmp_path: Path
) -> None:
    objects = Undeletable("memory:///")
    with pytest.raises(StopNow):
        publication(objects, job, tmp_path).publish(finished, check=nothing, before_commit=stop)
    ids = publication(objects, job, tmp_path).publish(finished, check=nothing, before_commit=nothing)
    assert published_before(objects, job) == ids


@pytest.mark.parametrize("folder", ["../outside", "/etc", "output/gone"])
def test_a_folder_outside_the_work_folder_is_refused(
    objects: ObjectStore, job: Job, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "outside").mkdir()
    work_folder = tmp_path / "work"
    work_folder.mkdir()
    output = OutputFolder(recipe_index=0, format="awq", folder=folder, summary={})
    with pytest.raises(JobFault) as fault:
        publication(objects, job, work_folder).publish(
            Finished(report="report.json", outputs=(output,)), check=nothing, before_commit=nothing
        )
    assert fault.value.code == "child_protocol"
