"""Searches by label read the jobs that have it, and find those of earlier versions too."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import Redis

from app.core.changes.redis_keys import LABELLED, label_key
from app.core.jobs.job_store import JobFilter, JobStore
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, transition
from app.core.records.specs import JobSpec

ENDS = (JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED)
FILTERS: tuple[dict[str, Any], ...] = (
    {"labels": {"team": "a"}},
    {"labels": {"team": "a", "run": "1"}},
    {"labels": {"team": "a"}, "state": JobState.FAILED},
    {"labels": {"team": "b"}, "state": JobState.SUCCEEDED},
    {"labels": {"run": "2", "team": "b"}, "state": JobState.QUEUED},
    {"labels": {"team": "a"}, "words": ("llama",)},
    {"labels": {"team": "nobody"}},
    {"labels": {"nothing": ""}},
    {"labels": {"team": "a:b=c"}},
)


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis)


def recorded(store: JobStore, tenant: str = "t", model: str = "org/qwen", **labels: str) -> Job:
    now = datetime.now(UTC)
    job = Job(id=new_id("job"), tenant=tenant, spec=JobSpec(model=model, labels=labels), created_at=now)
    assert store.create(job)
    return job


def ended(store: JobStore, job: Job, state: JobState) -> Job:
    if state is JobState.QUEUED:
        return job
    if state is JobState.SUCCEEDED:
        store.claim(job.id, 1, worker="w", lease_s=30)
    return store.update(job.id, lambda each: transition(each, state))


def many(store: JobStore, count: int = 60) -> list[Job]:
    draws, jobs = random.Random(7), []
    for number in range(count):
        labels = {"team": draws.choice(["a", "b", "a:b=c"]), "run": str(number % 3)}
        some = dict(draws.sample(sorted(labels.items()), draws.randint(0, 2)))
        job = recorded(store, model=draws.choice(["org/llama", "org/qwen"]), **some)
        jobs.append(ended(store, job, draws.choice(ENDS)))
    recorded(store, tenant="other", team="a", run="1")
    return jobs


def as_of_an_earlier_version(redis: Redis) -> None:
    """The jobs stay, the index is gone."""
    for key in redis.keys("nibble:label*"):
        redis.delete(key)


def walked(store: JobStore, **selection: Any) -> list[str]:
    """All pages of the selection."""
    ids: list[str] = []
    while True:
        page = store.page("t", JobFilter(limit=3, after=ids[-1] if ids else None, **selection))
        ids += [job.id for job in page.jobs]
        if not page.has_more:
            return ids


@pytest.mark.parametrize("earlier", [False, True])
def test_a_search_finds_what_reading_every_job_finds(store: JobStore, redis: Redis, *, earlier: bool) -> None:
    jobs = many(store)
    if earlier:
        as_of_an_earlier_version(redis)
    newest_first = sorted(jobs, key=lambda job: job.id, reverse=True)
    for selection in FILTERS:
        expected = [job.id for job in newest_first if JobFilter(**selection).matches(job)]
        assert walked(store, **selection) == expected, selection
    assert walked(store, labels={"team": "a"}) != []


def commands(redis: Redis) -> int:
    """The commands that Redis has run, those of scripts included."""
    stats: dict[str, dict[str, int]] = redis.info("commandstats")
    return sum(each["calls"] for name, each in stats.items() if name != "cmdstat_info")


def test_a_search_costs_what_it_finds_and_not_what_there_is(store: JobStore, redis: Redis) -> None:
    costs = []
    for _ in range(2):
        for _ in range(100):
            recorded(store, team="a")
        before = commands(redis)
        assert store.page("t", JobFilter(labels={"team": "nobody"})).jobs == ()
        assert store.page("t", JobFilter(labels={"team": "a"}, state=JobState.FAILED)).jobs == ()
        assert len(store.page("t", JobFilter(labels={"team": "a"}, limit=5)).jobs) == 5
        costs.append(commands(redis) - before)
    assert costs[0] == costs[1] < 30


def test_an_earlier_versions_jobs_are_read_once(store: JobStore, redis: Redis) -> None:
    for number in range(50):
        recorded(store, run=str(number))
    as_of_an_earlier_version(redis)
    late = recorded(store, run="50")  # by this version, before any search
    costs = []
    for _ in range(2):
        before = commands(redis)
        assert len(store.page("t", JobFilter(labels={"run": "7"})).jobs) == 1
        costs.append(commands(redis) - before)
    assert costs[0] > 100
    assert costs[1] < 10
    assert [job.id for job in store.page("t", JobFilter(labels={"run": "50"})).jobs] == [late.id]


def test_a_deleted_job_leaves_nothing_in_the_index(store: JobStore, redis: Redis) -> None:
    jobs = [
        ended(store, recorded(store, team="a", run=str(number)), JobState.CANCELLED) for number in range(3)
    ]
    for job in jobs[:2]:
        store.settle(job.id)
        store.delete("t", job.id)
    assert walked(store, labels={"team": "a"}) == [jobs[2].id]
    assert redis.hget(LABELLED, "t") == b"1"
    assert redis.keys("nibble:label:t:run=*") == [label_key("t", "run=2").encode()]
    store.settle(jobs[2].id)
    store.delete("t", jobs[2].id)
    assert redis.keys("nibble:label*") == []


def test_a_job_that_an_earlier_version_deleted_is_not_listed(store: JobStore, redis: Redis) -> None:
    jobs = [recorded(store, team="a") for _ in range(3)]
    redis.delete(f"nibble:job:{jobs[1].id}")
    redis.zrem("nibble:jobs:t", jobs[1].id)
    assert walked(store, labels={"team": "a"}) == [jobs[2].id, jobs[0].id]
