"""Worker processes that are killed, stopped and lied to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from redis import Redis
from rq import Queue
from rq.exceptions import StopRequested

from app.core.jobs.worker_registry import WorkerRegistry
from app.core.records.job import Job, JobState, transition
from app.core.records.job_changes import requeued
from tests.integration.workshop import REPOSITORY, Workshop, processes_with
from tests.waiting import wait_until
from workers.attempts.leftovers import Leftovers
from workers.main import describe_worker
from workers.queue_worker import QueueWorker


@pytest.fixture
def workshop(redis: Redis, redis_url: str, tmp_path: Path) -> Workshop:
    return Workshop(redis, redis_url, tmp_path / "state")


def checkpoints(workshop: Workshop, job: Job) -> int:
    return workshop.kinds(job).count("checkpoint")


def queued(workshop: Workshop, **labels: str) -> Job:
    job = workshop.submit(**labels)
    assert workshop.queue.enqueue(job)
    return job


def ended(workshop: Workshop, job: Job) -> bool:
    return workshop.store.load(job.id).is_terminal


def test_a_killed_workers_job_is_resumed_and_published_once(workshop: Workshop) -> None:
    job = queued(workshop, layers="8", pause="0.3")
    with workshop.worker("one") as first:
        wait_until(lambda: checkpoints(workshop, job) >= 3)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        done = checkpoints(workshop, job)
    # Horse and child go with the worker, whose group is not theirs.
    wait_until(lambda: not processes_with(str(workshop.settings.state_dir)))
    with workshop.worker("two"):

        def swept() -> bool:
            workshop.sweep()
            return ended(workshop, job)

        wait_until(swept)
        # Both attempts' folders go; the second's only after its record has ended.
        wait_until(lambda: list(workshop.settings.scratch_dir.iterdir()) == [])
    record = workshop.store.load(job.id)
    assert record.state is JobState.SUCCEEDED
    assert record.attempt == 2
    assert workshop.payload(job, "resumed")["attempt"] == 2
    assert done <= checkpoints(workshop, job) <= 9
    assert len(workshop.objects.list_folders("artifacts")) == 1
    assert workshop.objects.list_folders(f"artifacts/{record.artifacts[0]}") == ["attempt-2"]


def test_a_worker_told_to_stop_gives_its_job_back(workshop: Workshop) -> None:
    job = queued(workshop, layers="8", pause="0.3")
    with workshop.worker("one") as first:
        wait_until(lambda: checkpoints(workshop, job) >= 2)
        first.terminate()
        assert first.wait(timeout=60) == 0
    waiting = workshop.store.load(job.id)
    assert waiting.state is JobState.QUEUED
    assert waiting.attempt == 1
    with workshop.worker("two"):
        wait_until(lambda: ended(workshop, job))
    assert workshop.store.load(job.id).state is JobState.SUCCEEDED
    assert checkpoints(workshop, job) <= 9


def test_a_halted_worker_that_wakes_up_writes_nothing(workshop: Workshop) -> None:
    """SIGSTOP for longer than the lease: its successor publishes, and it finds itself replaced."""
    job = queued(workshop, layers="6", pause="0.3")
    with workshop.worker("one") as first:
        wait_until(lambda: checkpoints(workshop, job) >= 2)
        halted = [*processes_with(str(workshop.settings.state_dir)), first.pid]
        for pid in halted:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: not workshop.store.holds(job.id, 1))
        workshop.sweep()
        with workshop.worker("two"):
            wait_until(lambda: ended(workshop, job))
            # Its own folder goes only after its record has ended.
            wait_until(lambda: not (workshop.settings.scratch_dir / f"{job.id}-2").exists())
        for pid in reversed(halted):
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: list(workshop.settings.scratch_dir.iterdir()) == [])
        first.terminate()
        first.wait(timeout=60)
    record = workshop.store.load(job.id)
    assert (record.state, record.attempt) == (JobState.SUCCEEDED, 2)
    assert workshop.objects.list_folders(f"artifacts/{record.artifacts[0]}") == ["attempt-2"]


def test_the_queue_cannot_name_another_task(workshop: Workshop, redis: Redis, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    queue = Queue("nibble-normal", connection=redis, serializer="json")
    foreign = queue.enqueue_call("os.mkdir", args=(str(mark),))
    job = queued(workshop)
    with workshop.worker("one"):
        wait_until(lambda: ended(workshop, job))
    assert not mark.exists()
    assert foreign.get_status() == "failed"
    assert "may run" in workshop.log_of("one")


def test_workers_say_what_they_do(workshop: Workshop, redis: Redis) -> None:
    registry = WorkerRegistry(redis)
    with workshop.worker("one") as first:
        wait_until(registry.living)
        job = queued(workshop, layers="6", pause="0.3")
        wait_until(lambda: registry.living()[0].job == job.id)
        record = registry.living()[0]
        assert (record.name, record.device, record.tenant) == ("one", "cpu", "default")
        assert record.pid == first.pid
        wait_until(lambda: registry.living()[0].job is None)
        first.terminate()
        first.wait(timeout=60)
    assert registry.living() == []


def is_measured(pid: int) -> bool:
    """Whether the worker's device is being measured."""
    commands = [child.cmdline() for child in psutil.Process(pid).children()]
    return any("workers.devices.profile_measurement" in command for command in commands)


def test_a_job_does_not_wait_for_the_measurement_of_the_device(
    workshop: Workshop, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where no earlier worker has left rates
    registry, state_dir = WorkerRegistry(redis), str(workshop.settings.state_dir)

    def state() -> str | None:
        return next((worker.state for worker in registry.living()), None)

    with workshop.worker("one", "-m", "tests.integration.stand_in_worker", "one", "--measure") as worker:
        wait_until(lambda: state() == "measuring")
        assert is_measured(worker.pid)
        job = queued(workshop, layers="6", pause="0.3")
        wait_until(lambda: checkpoints(workshop, job) >= 1)
        assert not is_measured(worker.pid)
        assert state() == "busy"
        wait_until(lambda: ended(workshop, job))
        wait_until(lambda: state() == "measuring")
        worker.terminate()
        assert worker.wait(timeout=60) == 0
    wait_until(lambda: not processes_with(state_dir))
    assert workshop.store.load(job.id).state is JobState.SUCCEEDED
    note = workshop.payload(job, "note")
    assert note["code"] == "rates_assumed"
    assert "times are rough" in str(note["message"])


def test_a_starting_worker_removes_what_dead_attempts_left(workshop: Workshop) -> None:
    job = workshop.submit()
    dead = workshop.settings.scratch_dir / f"{job.id}-1"
    alive = workshop.settings.scratch_dir / f"{job.id}-2"
    dead.mkdir()
    alive.mkdir()
    workshop.store.claim(job.id, 1, worker="w", lease_s=60)
    workshop.store.release(job.id, 1)
    workshop.store.update(job.id, requeued)
    workshop.store.claim(job.id, 2, worker="w", lease_s=60)
    with workshop.worker("one"):
        wait_until(lambda: not dead.exists())
        assert alive.exists()


def test_what_a_killed_attempt_of_a_cancelled_job_left_is_removed_by_its_worker(workshop: Workshop) -> None:
    """No attempt follows that would remove it."""
    job = queued(workshop, layers="8", pause="0.3")
    with workshop.worker("one") as first:
        wait_until(lambda: checkpoints(workshop, job) >= 2)
        workshop.store.update(job.id, lambda record: transition(record, JobState.CANCELLING))
        for horse in psutil.Process(first.pid).children():
            horse.kill()

        def swept() -> bool:
            workshop.sweep()
            return ended(workshop, job)

        wait_until(swept)
        assert (workshop.settings.scratch_dir / f"{job.id}-1").exists()
        first.terminate()
        assert first.wait(timeout=60) == 0
    assert workshop.store.load(job.id).state is JobState.CANCELLED
    assert list(workshop.settings.scratch_dir.iterdir()) == []


def test_an_idle_worker_removes_leftovers_at_its_maintenance(workshop: Workshop, redis: Redis) -> None:
    job = workshop.submit()
    dead = workshop.settings.scratch_dir / f"{job.id}-1"
    dead.mkdir()
    leftovers = Leftovers(workshop.settings.scratch_dir, workshop.store)
    worker = QueueWorker(redis, describe_worker("cpu", "one"), threading.Event(), leftovers)
    workshop.store.claim(job.id, 1, worker="w", lease_s=60)
    worker.run_maintenance_tasks()
    assert dead.exists()
    # Its attempt was killed after its last word: the lease still runs.
    workshop.store.update(job.id, lambda record: transition(record, JobState.SUCCEEDED), attempt=1)
    worker.run_maintenance_tasks()
    assert not dead.exists()


def test_a_horse_that_was_being_forked_when_the_signal_came_hears_it_later(
    workshop: Workshop, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftovers = Leftovers(workshop.settings.scratch_dir, workshop.store)
    worker = QueueWorker(redis, describe_worker("cpu", "one"), threading.Event(), leftovers)
    monkeypatch.setattr("rq.worker.Worker.maintain_heartbeats", lambda *_: None)
    with pytest.raises(StopRequested):
        worker._shutdown()
    with subprocess.Popen(["sleep", "600"]) as horse:
        worker._horse_pid = horse.pid
        worker.maintain_heartbeats(None, None)
        assert horse.wait(60) == -signal.SIGTERM


def test_a_health_check_knows_whether_this_host_has_a_worker(workshop: Workshop, redis: Redis) -> None:
    environment = {**os.environ, "NIBBLE_REDIS_URL": str(workshop.settings.redis_url)}
    command = [sys.executable, "-m", "app.cli", "worker", "--check"]

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )

    silent = check()
    assert silent.returncode != 0
    assert "sends heartbeats" in silent.stderr
    with workshop.worker("one"):
        wait_until(WorkerRegistry(redis).living)
        assert check().returncode == 0
