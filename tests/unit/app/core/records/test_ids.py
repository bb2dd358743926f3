from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from ulid import ULID

from app.core.records.ids import artifact_id, first_id, is_id, new_id


def test_an_id_names_its_kind() -> None:
    job = new_id("job")
    assert is_id("job", job)
    assert not is_id("art", job)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "job_",
        "job_x",
        "job_../../etc",
        "job_01M823S510D0DJEWVM94T0ZK2G0",
        "job_01m823s510d0djewvm94t0zk2g",
    ],
)
def test_other_text_is_no_id(value: str) -> None:
    assert not is_id("job", value)


def test_attempts_agree_on_the_artifact() -> None:
    job = new_id("job")
    assert artifact_id(job, 0, "awq") == artifact_id(job, 0, "awq")
    assert is_id("art", artifact_id(job, 0, "awq"))


def test_each_output_has_an_id_of_its_own_and_its_jobs_time() -> None:
    job = new_id("job")
    ids = {artifact_id(job, 0, "awq"), artifact_id(job, 1, "awq"), artifact_id(job, 0, "compressed-tensors")}
    assert len(ids) == 3
    assert {artifact[4:14] for artifact in ids} == {job[4:14]}


def test_the_first_id_of_a_moment_lies_between_the_ids_around_it() -> None:
    noon = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
    before, same, after = (f"job_{ULID.from_datetime(noon + timedelta(seconds=n))}" for n in (-1, 0, 1))
    middle = first_id("job", noon)
    assert before < middle <= same < after
    assert is_id("job", middle)
    assert first_id("job", datetime(1926, 1, 1, tzinfo=UTC)) == f"job_{'0' * 26}"
