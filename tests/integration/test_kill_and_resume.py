"""The real job child, killed with -9 in the middle of its layers, goes on to the bytes of an unbroken run.

Its progress goes to a socket that holds a few messages only. So a child whose messages are not read comes
to a halt, and is killed while it works, however busy the host is.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.core.child.assignment import (
    CHECKPOINTS,
    REPORT,
    Checkpointed,
    Finished,
    ProgressMessage,
    progress_messages,
)
from app.core.jobs.report import Report
from app.core.records.specs import JobSpec, Recipe, SearchSpec
from tests.tiny_models import assignment, tiny_model, tiny_spec

LAYERS, MIDDLE = 4, 1
SMALL = {"group_size": 32, "bits": 3}
GRID, LEARNED = SearchSpec(grid_points=3), SearchSpec(grid_points=3, epochs=4)
RECIPES = {
    "rtn": Recipe(method="rtn", **SMALL),
    "awq grid": Recipe(search=GRID, **SMALL),
    "awq evolutionary": Recipe(search=SearchSpec(strategy="evolutionary", grid_points=3, budget=16), **SMALL),
    "awq gptq": Recipe(rounding="gptq", search=GRID, **SMALL),
    "gptq": Recipe(method="gptq", **SMALL),
    "omniquant": Recipe(method="omniquant", search=LEARNED, **SMALL),
    "omniquant gptq": Recipe(method="omniquant", rounding="gptq", search=LEARNED, **SMALL),
}
# A process takes seconds to start, so methods that work alike share a job.
JOBS = (("rtn", "awq grid", "awq evolutionary"), ("awq gptq", "gptq"), ("omniquant", "omniquant gptq"))


def spec(*names: str) -> JobSpec:
    recipes = tuple(RECIPES[name] for name in names)
    return tiny_spec(recipes, formats=("compressed-tensors",))


@contextmanager
def child(job: JobSpec, model: Path, work: Path) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A job child, and where its messages can be read."""
    work.mkdir(exist_ok=True)
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's smallest
    command = [sys.executable, "-m", "workers.child", "--progress-fd", str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(theirs.fileno(),), text=True) as process,
    ):
        theirs.close()
        assert process.stdin is not None
        process.stdin.write(assignment(job, model, work, threads=1).model_dump_json())
        process.stdin.close()
        try:
            yield process, ours
        finally:
            process.kill()


def messages_of(channel: socket.socket) -> Iterator[ProgressMessage]:
    waiting = b""
    while content := channel.recv(1):
        waiting += content
        if content == b"\n":
            yield progress_messages.validate_json(waiting)
            waiting = b""


def run_to_the_end(job: JobSpec, model: Path, work: Path) -> list[ProgressMessage]:
    with child(job, model, work) as (process, channel):
        messages = list(messages_of(channel))
        assert process.wait() == 0
    return messages


def kill_after(key: str, job: JobSpec, model: Path, work: Path) -> None:
    """Run until the checkpoint is written; then the process is gone, in whatever it was doing."""
    with child(job, model, work) as (process, channel):
        for message in messages_of(channel):
            assert not isinstance(message, Finished)
            if isinstance(message, Checkpointed) and message.key == key:
                break
        process.kill()
        assert process.wait() == -signal.SIGKILL


def outputs(work: Path) -> list[dict[str, bytes]]:
    """The files of each candidate, in the order of recipes."""
    folders = sorted(path for path in (work / "output").iterdir() if path.is_dir())
    return [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]


def solved_layers(messages: list[ProgressMessage]) -> set[int]:
    """A run that takes long keeps its hidden states from time to time, too: those are no layers."""
    keys = [message.key for message in messages if isinstance(message, Checkpointed)]
    return {int(key.split("-")[1]) for key in keys if key.startswith("layer-")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """By recipe, from one run: what a recipe gives does not depend on the others of its job."""
    work = tmp_path_factory.mktemp("unbroken")
    run_to_the_end(spec(*RECIPES), model, work)
    return dict(zip(RECIPES, outputs(work), strict=True))


@pytest.mark.parametrize("names", JOBS, ids=", ".join)
def test_a_killed_child_is_resumed_to_the_same_bytes(
    names: tuple[str, ...], model: Path, unbroken: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    job, work = spec(*names), tmp_path / "work"
    last = len(names) - 1
    kill_after(f"layer-{MIDDLE:05d}-recipe-{last:02d}.safetensors", job, model, work)
    assert not (work / REPORT).exists()
    before = {path.name: path.stat().st_mtime_ns for path in (work / CHECKPOINTS).glob("layer-*")}
    messages = run_to_the_end(job, model, work)
    resumed_at = Report.model_validate_json((work / REPORT).read_text()).resumed_at_layer
    assert MIDDLE < resumed_at < LAYERS
    assert solved_layers(messages) == set(range(resumed_at, LAYERS))
    for layer in range(resumed_at):
        for recipe in range(len(names)):
            path = work / CHECKPOINTS / f"layer-{layer:05d}-recipe-{recipe:02d}.safetensors"
            assert path.stat().st_mtime_ns == before[path.name]
    assert outputs(work) == [unbroken[name] for name in names]
