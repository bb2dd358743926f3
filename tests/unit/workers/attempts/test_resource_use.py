"""Samples of what a job's process uses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.records.job import Job, JobState, Progress, ResourceUse, transition
from app.core.records.specs import JobSpec
from tests.waiting import wait_until
from workers.attempts import resource_use as module
from workers.attempts.resource_use import MOST, ResourceSampler, SampleHistory, process_use

BUSY = """
import subprocess, sys, time
block = bytearray(60_000_000)
block[:: 4096] = b"x" * len(block[:: 4096])
code = "block = b'x' * 40_000_000; print(1, flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
while True:
    sum(range(10_000))
"""


@pytest.fixture
def busy() -> Iterator[int]:
    """The id of a process that works on one core, with a child; 100 MB between them."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_process_is_counted_with_what_it_started(busy: int) -> None:
    memory, seconds = process_use(busy)
    assert memory > 100_000_000
    assert process_use(busy)[1] >= seconds


def test_a_process_that_has_ended_uses_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert process_use(process.pid) == (0, 0.0)


def test_a_running_process_is_sampled(busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    with ResourceSampler(busy, "cpu") as sampler:
        wait_until(lambda: sampler.use is not None and max(sampler.use.cpu_cores) > 0)
    assert sampler.use is not None
    assert sampler.peak_bytes is not None
    assert sampler.peak_bytes > 100_000_000
    assert 0 < max(sampler.use.cpu_cores) < 3
    assert sampler.use.gpu_memory_bytes == sampler.use.gpu_share == ()


def test_a_gpu_is_asked_through_the_drivers_program(
    busy: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ntest "$2 $5" = "--query-gpu=memory.used,utilization.gpu 1" || test "$1" = '
                       '"--query-gpu=memory.used,utilization.gpu" && echo "512, 37"\n')  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    sample = ResourceSampler(busy, "cuda:1")._gpu_sample()
    assert sample == (512 * 1024**2, 0.37)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert ResourceSampler(busy, "cuda:1")._gpu_sample() == ()


def test_any_time_has_few_samples_with_its_peaks_and_means() -> None:
    history = SampleHistory()
    sizes, use = [], None
    for step in range(40 * MOST):
        use = history.add((1000.0 + (step == 777), step % 2, 5.0, 0.5))
        sizes.append(len(use.memory_bytes))
        assert len(use.cpu_cores) == len(use.memory_bytes) == len(use.gpu_share)
    assert use is not None
    assert sizes[:5] == [1, 2, 3, 4, 5]
    assert max(sizes) == MOST
    assert use.every_s == 64 * module.EVERY_S
    assert max(use.memory_bytes) == 1001
    assert set(use.cpu_cores[:-1]) == {0.5}
    steps = use.every_s / module.EVERY_S
    assert (len(use.memory_bytes) - 1) * steps < 40 * MOST <= len(use.memory_bytes) * steps
    # What a running job's record holds of it.
    assert len(use.model_dump_json()) < 1500


def test_an_ended_job_holds_no_samples() -> None:
    use = SampleHistory().add((1.0, 1.0))
    job = Job(
        id="job_1", tenant="t", spec=JobSpec(model="a/b"), created_at=use.began_at, state=JobState.RUNNING,
        progress=Progress(fraction=0.5, layer=2, layers=4, use=use),
    )  # fmt: skip
    assert isinstance(job.progress.use, ResourceUse)
    for end in (JobState.FAILED, JobState.SUCCEEDED):
        assert transition(job, end).progress.use is None
    assert transition(job, JobState.FAILED).progress.layer == 2
    assert transition(job, JobState.CANCELLING).progress.use == use
