"""Job records in Redis: every change is a compare-and-set on the record's version."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import Field
from redis import Redis

from app.core.changes.atomic_changes import versioned_update
from app.core.changes.redis_keys import (
    ENDED,
    LINES,
    active_key,
    events_key,
    job_key,
    jobs_key,
    jobs_stamp,
    lease_key,
    line_key,
    postponed_key,
    state_key,
    turns_key,
)
from app.core.errors import (
    Conflict,
    NibbleError,
    NotFound,
    QuotaExceeded,
    RecordUnreadable,
)
from app.core.jobs.job_encoding import announcement, decode, encode, state_payload
from app.core.jobs.job_scripts import (
    APPEND,
    CREATE,
    DELETE,
    IN_QUEUE,
    NEXT_TURN,
    OLDEST,
    RELEASE,
    RENEW,
    SETTLE,
    STRIKE,
    SWAP,
)
from app.core.jobs.label_index import LabelIndex, label_keys
from app.core.outgoing.delivery_scripts import delivery_keys
from app.core.outgoing.webhook_messages import message_of
from app.core.records.ids import check_cursor, first_id, is_id
from app.core.records.job import TRANSITIONS, Job, JobState
from app.core.records.job_changes import claimed, is_executing, stale
from app.core.records.specs import Frozen

log = logging.getLogger(__name__)

PAGE_STEP = 200
SCANNED_AT_ONCE = 1000
RANKS = {"high": 0, "normal": 1, "low": 2}  # in line; of the same rank the older one is first


class JobEvent(Frozen):
    """One line of a job's history. Ids are Redis stream ids, so they order events and name their time."""

    id: str
    created_at: datetime
    kind: str
    payload: dict[str, Any]


class JobFilter(Frozen):
    """Selects the jobs of a page: newest first, older than the id `after`."""

    state: JobState | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    words: tuple[str, ...] = ()  # lower case; each in the id, the model, a recipe's label or a label
    limit: int = 20
    after: str | None = None

    @property
    def looks_inside(self) -> bool:
        """Whether records must be read to tell; for labels and rare states there are sets of ids."""
        return self.state is not None or bool(self.words)

    def matches(self, job: Job) -> bool:
        if self.state is not None and job.state is not self.state:
            return False
        if any(job.spec.labels.get(key) != value for key, value in self.labels.items()):
            return False
        return not self.words or all(word in searched_text(job) for word in self.words)


def searched_text(job: Job) -> str:
    """What a search looks through."""
    labels = (f"{key}={value}" for key, value in job.spec.labels.items())
    recipes = (recipe.label for recipe in job.spec.recipes)
    return "\n".join((job.id, job.spec.model, *recipes, *labels)).lower()


class JobPage(Frozen):
    jobs: tuple[Job, ...]
    has_more: bool


def missing(job_id: str) -> NotFound:
    return NotFound(
        f"there is no job {job_id[:64]}",
        code="job_not_found",
        remedy="`nibble jobs` and GET /v1/jobs list yours; deleted ones and other tenants' are not shown",
    )


def job_keys(job: Job) -> dict[str, str]:
    """For JOB_KEYS of the scripts."""
    return {
        "job": job_key(job.id),
        "state": state_key(job.state),
        "events": events_key(job.id),
        "active_jobs": active_key(job.tenant),
        "turns": turns_key(job.tenant),
        "line": line_key(job.tenant),
        "jobs_stamp": jobs_stamp(job.tenant),
    }


def delivery_of(before: Job | None, after: Job) -> dict[str, str | None]:
    """For DELIVERY_KEYS and DELIVERY_ARGS of the scripts, which touch none of the keys without a message."""
    return delivery_keys(after.id, message_of(before, after))


def check_change(before: Job, after: Job) -> None:
    """Raise Conflict for a change of state that TRANSITIONS does not allow."""
    allowed = after.state is before.state or after.state in TRANSITIONS[before.state]
    if before.is_terminal or not allowed:
        raise Conflict(
            f"job {before.id} is {before.state} and cannot be changed to {after.state}",
            code="invalid_transition",
            remedy="read the job again: its state has changed since you looked",
        )


class JobStore:
    """Reads and writes job records, for the API, the workers and the janitor."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._create, self._swap, self._delete = CREATE.on(redis), SWAP.on(redis), DELETE.on(redis)
        self._settle, self._append = SETTLE.on(redis), APPEND.on(redis)
        self._next_turn, self._strike = NEXT_TURN.on(redis), STRIKE.on(redis)
        self._oldest = OLDEST.on(redis)
        self._renew, self._release = RENEW.on(redis), RELEASE.on(redis)
        self._labels = LabelIndex(redis)

    def create(self, job: Job, *, most_active: int = 0, most_turns: int = 0, least_queued: int = 0) -> bool:
        """Record a new job; False if its id exists already.

        Raises QuotaExceeded if the tenant has `most_active` jobs that have not ended; 0 is no limit. Beyond
        `most_turns` jobs that are queued or run, or `least_queued` of its priority that are queued (more with
        many workers), it waits in line.
        """
        created = self._create(
            **job_keys(job),
            **delivery_of(None, job),
            tenant_jobs=jobs_key(job.tenant),
            labels=label_keys(job.tenant, job.spec.labels),
            id=job.id,
            tenant=job.tenant,
            record=encode(job),
            spec=job.spec.model_dump_json(),
            payload=state_payload(job),
            is_active=int(not job.is_terminal),
            most_active=most_active,
            most_turns=most_turns,
            least_queued=least_queued,
            rank=RANKS[job.spec.priority],
        )
        if created < 0:
            raise QuotaExceeded(
                f"the tenant {job.tenant} has {most_active} jobs that have not ended, which is its limit",
                code="job_quota_exceeded",
                remedy="wait until jobs end, cancel some, or let the operator raise the limit",
            )
        return bool(created)

    def read(self, job_id: str) -> tuple[Job, int]:
        """The job and the version of its record."""
        if not is_id("job", job_id):
            raise missing(job_id)
        record, spec, version = self._redis.hmget(job_key(job_id), "record", "spec", "version")
        if record is None:
            raise missing(job_id)
        return decode(record, spec), int(version)

    def load(self, job_id: str) -> Job:
        return self.read(job_id)[0]

    def read_for(self, tenant: str, job_id: str) -> tuple[Job, int]:
        """As `read`; NotFound also for a job of another tenant."""
        job, version = self.read(job_id)
        if job.tenant != tenant:
            raise missing(job_id)
        return job, version

    def get(self, tenant: str, job_id: str) -> Job:
        return self.read_for(tenant, job_id)[0]

    def version(self, job_id: str) -> int:
        """The record's version, which grows with each change; 0 if there is no such job."""
        return int(self._redis.hget(job_key(job_id), "version") or 0)

    def update(self, job_id: str, change: Callable[[Job], Job], attempt: int | None = None) -> Job:
        """Apply `change` to the record, again from the start if another writer was faster.

        With `attempt`, only the attempt that executes the job may write: Conflict `stale_attempt` otherwise.
        A change of state or stage is also appended to the events.
        """

        def read() -> tuple[Job, int]:
            job, version = self.read(job_id)
            if attempt is not None and not is_executing(job, attempt):
                raise stale(job, attempt)
            return job, version

        return versioned_update(f"job {job_id}", read, change, self._write)

    def _write(self, before: Job, after: Job, version: int) -> bool:
        """Write the change unless the record has another version by now."""
        check_change(before, after)
        kind, payload = announcement(before, after)
        failure = after.error.code if after.state is JobState.FAILED and after.error is not None else None
        return bool(
            self._swap(
                **job_keys(after),
                **delivery_of(before, after),
                state_before=state_key(before.state),
                id=after.id,
                version=version,
                record=encode(after),
                change=secrets.token_hex(8),
                kind=kind,
                payload=payload,
                is_active=int(not after.is_terminal),
                failure=failure,
            )
        )

    def page(self, tenant: str, selection: JobFilter) -> JobPage:
        """A page of the tenant's jobs, newest first."""
        jobs: list[Job] = []
        for job in self._newest_first(tenant, selection):
            if selection.matches(job):
                jobs.append(job)
            if len(jobs) > selection.limit:
                break
        return JobPage(jobs=tuple(jobs[: selection.limit]), has_more=len(jobs) > selection.limit)

    def counts_of(self, tenant: str) -> dict[JobState, int]:
        """How many of the tenant's jobs are in each state."""
        rare = [state for state in JobState if state is not JobState.SUCCEEDED]
        pipe = self._redis.pipeline()  # at one moment
        pipe.zcard(jobs_key(tenant))
        for state in rare:
            pipe.zintercard(2, [jobs_key(tenant), state_key(state)])
        total, *counts = pipe.execute()
        # Not counted as the others are: that would look at each of the tenant's jobs.
        by_state = dict(zip(rare, counts, strict=True)) | {JobState.SUCCEEDED: total - sum(counts)}
        return {state: by_state[state] for state in JobState}

    def _newest_first(self, tenant: str, selection: JobFilter) -> Iterator[Job]:
        """Candidates of the selection: at least those that match."""
        check_cursor("job", selection.after)
        sets = self._labels.sets(tenant, selection.labels)
        if selection.state not in (None, JobState.SUCCEEDED):
            sets.append(state_key(selection.state))  # among many that succeeded the others are few
        if len(sets) > 1 or selection.state not in (None, JobState.SUCCEEDED):
            ids = self._in_all([jobs_key(tenant), *sets], selection.after)
            yield from self.load_each(ids, step=selection.limit + 1)
        else:
            yield from self._in_order(sets[0] if sets else jobs_key(tenant), selection)

    def _in_all(self, keys: Sequence[str], after: str | None) -> list[str]:
        """The ids that are in every set, newest first."""
        newest_first = sorted((job_id.decode() for job_id in self._redis.zinter(keys)), reverse=True)
        return [job_id for job_id in newest_first if after is None or job_id < after]

    def _in_order(self, ordered: str, selection: JobFilter) -> Iterator[Job]:
        """The jobs of a sorted set of ids, read as far as they are asked for."""
        after = selection.after
        step = PAGE_STEP if selection.looks_inside else selection.limit + 1
        while True:
            upper = "+" if after is None else f"({after}"
            ids = self._redis.zrevrangebylex(ordered, upper, "-", start=0, num=step)
            yield from self.load_each([job_id.decode() for job_id in ids])
            if len(ids) < step:
                return
            after = ids[-1].decode()

    def load_each(self, job_ids: Sequence[str], *, step: int = PAGE_STEP) -> Iterator[Job]:
        """The jobs of these ids that exist and can be read, in their order, `step` at a time."""
        for start in range(0, len(job_ids), step):
            pipe = self._redis.pipeline(transaction=False)
            for job_id in job_ids[start : start + step]:
                pipe.hmget(job_key(job_id), "record", "spec")
            for record, spec in pipe.execute():
                if record is None:  # deleted since the ids were read
                    continue
                try:
                    yield decode(record, spec)
                except RecordUnreadable as fault:
                    log.warning("left out: %s", fault.message)

    def delete(self, tenant: str, job_id: str) -> Job:
        """Remove a job that has ended, with its events.

        Raises Conflict until it has ended and its end is followed up, which needs the record.
        """
        job, version = self.read_for(tenant, job_id)
        if not job.is_terminal:
            raise Conflict(
                f"job {job_id} is {job.state}; only jobs that have ended can be deleted",
                code="job_not_finished",
                remedy="cancel it first and wait until it has stopped",
            )
        deleted = self._delete(
            job=job_key(job_id),
            state=state_key(job.state),
            events=events_key(job_id),
            lease=lease_key(job_id),
            tenant_jobs=jobs_key(tenant),
            jobs_stamp=jobs_stamp(tenant),
            labels=label_keys(tenant, job.spec.labels),
            id=job_id,
            tenant=tenant,
            version=version,
        )
        if deleted == -1:
            raise Conflict(
                f"job {job_id} has ended just now, and what follows from that is not done yet",
                code="job_not_settled",
                remedy="try again in a moment",
            )
        return job

    def unsettled(self) -> list[str]:
        """The ids of ended jobs that are not followed up yet, oldest first."""
        return sorted(job_id.decode() for job_id in self._redis.smembers(ENDED))

    def is_settled(self, job_id: str) -> bool:
        """False from a job's end until it is followed up."""
        return not self._redis.sismember(ENDED, job_id)

    def settle(self, job_id: str) -> None:
        """Mark the job's end as followed up, and wake those who wait for that."""
        self._settle(id=job_id)

    def active_of(self, tenant: str) -> Iterator[Job]:
        """The tenant's jobs that have not ended, as far as this version can read them."""
        for job_id in self._redis.smembers(active_key(tenant)):
            try:
                yield self.load(job_id.decode())
            except NotFound:
                continue

    def in_state(self, *states: JobState) -> list[str]:
        """The ids of all tenants' jobs in one of the states at this moment, oldest first."""
        keys = [state_key(state) for state in states]
        # A union copies even a single set.
        ids = self._redis.smembers(keys[0]) if len(keys) == 1 else self._redis.sunion(keys)
        return sorted(job_id.decode() for job_id in ids)

    def recorded_before(self, moment: datetime, *states: JobState) -> Iterator[str]:
        """The ids of jobs in one of the states that are older; some twice, read a few at a time."""
        limit = first_id("job", moment)
        for state in states:
            for member in self._redis.sscan_iter(state_key(state), count=SCANNED_AT_ONCE):
                if (job_id := member.decode()) < limit:
                    yield job_id

    def oldest_in(self, state: JobState) -> str | None:
        """The id of the oldest job in the state."""
        oldest = self._oldest(jobs=state_key(state))
        return oldest.decode() if oldest is not None else None

    def age_s(self, job_id: str) -> float:
        """Seconds since the job was recorded, by the clock of Redis: those of hosts may jump."""
        first = self._redis.xrange(events_key(job_id), count=1)
        seconds, microseconds = self._redis.time()
        created_s = int(first[0][0].partition(b"-")[0]) / 1000 if first else seconds
        return float(seconds + microseconds / 1e6 - created_s)

    def counts(self) -> dict[JobState, int]:
        pipe = self._redis.pipeline(transaction=False)
        for state in JobState:
            pipe.scard(state_key(state))
        return dict(zip(JobState, pipe.execute(), strict=True))

    def append_event(
        self, job_id: str, kind: str, payload: dict[str, Any], attempt: int | None = None
    ) -> str:
        """Add to the job's history and return the event's id. With `attempt`, as in `update`."""
        event_id = self._add_event(job_id, kind, payload, attempt=attempt)
        if event_id == -1:
            raise stale(self.load(job_id), attempt or 0)
        return str(event_id.decode())

    def append_once(self, job_id: str, name: str, kind: str, payload: dict[str, Any]) -> None:
        """Add an event to the job's history, unless one was added under this name before."""
        self._add_event(job_id, kind, payload, once=f"once:{name}")

    def _add_event(
        self,
        job_id: str,
        kind: str,
        payload: dict[str, Any],
        attempt: int | None = None,
        once: str | None = None,
    ) -> Any:
        """Run APPEND and return its result. Raises NotFound if there is no such job."""
        event_id = self._append(
            job=job_key(job_id),
            events=events_key(job_id),
            id=job_id,
            kind=kind,
            payload=json.dumps(payload),
            attempt=attempt,
            once=once,
        )
        if event_id is None:
            raise missing(job_id)
        return event_id

    def has_appended(self, job_id: str, name: str) -> bool:
        """Whether `append_once` has added an event under this name."""
        return bool(self._redis.hexists(job_key(job_id), f"once:{name}"))

    def events(self, job_id: str, after: str | None = None, limit: int = 100) -> list[JobEvent]:
        """Events after the id `after`, oldest first."""
        entries = self._redis.xrange(
            events_key(job_id), "-" if after is None else f"({after}", "+", count=limit
        )
        return [
            JobEvent(
                id=event_id.decode(),
                created_at=datetime.fromtimestamp(int(event_id.partition(b"-")[0]) / 1000, UTC),
                kind=fields[b"kind"].decode(),
                payload=json.loads(fields[b"payload"]),
            )
            for event_id, fields in entries
        ]

    def claim(self, job_id: str, attempt: int, *, worker: str, lease_s: float) -> Job:
        """Take the lease and start `attempt`. Conflict if the job is not waiting for just this attempt.

        The lease comes first: a running job without one counts as lost.
        """
        if not self.acquire(job_id, attempt, lease_s):
            raise Conflict(
                f"another worker holds the lease of job {job_id}",
                code="lease_held",
                remedy="nothing: the job is being executed",
            )
        try:
            return self.update(job_id, lambda job: claimed(job, attempt, worker))
        except NibbleError:
            self.release(job_id, attempt)
            raise

    def is_in_line(self, job: Job) -> bool:
        """Whether the job waits in its tenant's line, and so is in no queue."""
        score = self._redis.zscore(line_key(job.tenant), job.id)
        return score is not None and score < IN_QUEUE

    def next_turn(self, tenant: str, most: int, least_queued: int = 0) -> str | None:
        """Give the first job in line a turn; None if none may have one.

        The tenant may have `most` jobs queued or running, and `least_queued` of each priority queued (more
        with many workers); 0 is no limit.
        """
        keys = {"turns": turns_key(tenant), "line": line_key(tenant)}
        first = self._next_turn(**keys, most=most, least_queued=least_queued)
        return first.decode() if first is not None else None

    def in_lines(self) -> set[str]:
        """The ids of all tenants' jobs that wait in line, and so are in no queue."""
        pipe = self._redis.pipeline(transaction=False)
        for tenant in self.tenants_with_lines():
            pipe.zrangebyscore(line_key(tenant), "-inf", f"({IN_QUEUE}")
        return {job_id.decode() for line in pipe.execute() for job_id in line}

    def strike_claimed(self, tenant: str) -> None:
        """Strike out of the tenant's line what is not queued any more, whoever claimed it."""
        self._strike(line=line_key(tenant), waiting=state_key(JobState.QUEUED), tenant=tenant)

    def turns_taken(self, tenant: str) -> int:
        return int(self._redis.scard(turns_key(tenant)))

    def tenants_with_lines(self) -> list[str]:
        """The tenants with jobs in line or in the queue."""
        return sorted(tenant.decode() for tenant in self._redis.smembers(LINES))

    def postpone(self, job_id: str, seconds: float) -> None:
        """Keep janitors from queueing the job for `seconds`, by the clock of Redis."""
        self._redis.set(postponed_key(job_id), 1, px=max(1, int(seconds * 1000)))

    def is_postponed(self, job_id: str) -> bool:
        return bool(self._redis.exists(postponed_key(job_id)))

    def acquire(self, job_id: str, attempt: int, lease_s: float) -> bool:
        """Take the lease for `lease_s` seconds; False if it is held."""
        return bool(self._redis.set(lease_key(job_id), attempt, nx=True, px=int(lease_s * 1000)))

    def renew(self, job_id: str, attempt: int, lease_s: float) -> bool:
        """Extend the lease to `lease_s` seconds; False if it was lost, and the attempt must stop."""
        return bool(self._renew(lease=lease_key(job_id), attempt=attempt, milliseconds=int(lease_s * 1000)))

    def holds(self, job_id: str, attempt: int) -> bool:
        """Whether the lease of `attempt` is alive."""
        return bool(self._redis.get(lease_key(job_id)) == str(attempt).encode())

    def without_lease(self, job_ids: Sequence[str]) -> list[str]:
        """Those of the jobs that no attempt holds a lease of."""
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.exists(lease_key(job_id))
        return [job_id for job_id, held in zip(job_ids, pipe.execute(), strict=True) if not held]

    def release(self, job_id: str, attempt: int) -> bool:
        return bool(self._release(lease=lease_key(job_id), attempt=attempt))
