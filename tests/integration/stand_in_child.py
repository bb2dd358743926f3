"""Stands in for the engine in fault tests: speaks the real protocol, computes nothing.

Labels of the job say how it behaves: `layers`, `pause` (seconds for each), and `fault`, met after two layers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from app.core.child.assignment import (
    CHECKPOINTS,
    OUTPUT,
    Assignment,
    Checkpointed,
    Failed,
    Finished,
    Noted,
    OutputFolder,
    Progressed,
    StageStarted,
)
from app.core.records.job import Problem, Stage
from workers.child.progress_pipe import ProgressPipe


def meet(fault: str, pipe: ProgressPipe, work_folder: Path) -> None:
    """Do what the label asks for."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        sys.stderr.write("the last words\n")
        sys.exit(3)
    elif fault == "hang":
        time.sleep(600)
    elif fault == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    elif fault in ("out_of_memory", "device_failed"):
        pipe.send(Failed(error=Problem(code=fault, message="cuda:0 failed", remedy="see dmesg")))
        sys.exit(1)
    elif fault == "report":
        problem = Problem(code="target_missed", message="ratio 1.2", remedy="more bits")
        (work_folder / "tries.json").write_text('{"tries": [], "published": []}')
        pipe.send(Failed(error=problem, report="tries.json"))
        sys.exit(0)
    elif fault == "babble":
        os.write(pipe._descriptor, b"not a message\n")
        time.sleep(600)


def compute(assignment: Assignment, pipe: ProgressPipe) -> str:
    """A value that depends on each layer's checkpoint in turn."""
    labels = assignment.spec.labels
    layers, value = int(labels.get("layers", "4")), assignment.model_digest
    for layer in range(layers):
        path = assignment.work_folder / CHECKPOINTS / f"layer-{layer}"
        if not path.exists():
            time.sleep(float(labels.get("pause", "0")))
            aside = path.with_suffix(".part")
            aside.write_text(hashlib.sha256(f"{value}{layer}".encode()).hexdigest())
            aside.rename(path)
            pipe.send(Checkpointed(key=f"layer-{layer}"))
        value = path.read_text()
        pipe.send(Progressed(fraction=(layer + 1) / layers, layer=layer + 1, layers=layers))
        if layer == 1:
            meet(labels.get("fault", ""), pipe, assignment.work_folder)
    return value


def write_output(assignment: Assignment, value: str) -> Finished:
    outputs = []
    for name in assignment.spec.formats:
        folder = f"{OUTPUT}/{name}"
        path = assignment.work_folder / folder
        path.mkdir(parents=True)
        (path / "model.safetensors").write_text(value * 100)
        (path / "config.json").write_text("{}")
        outputs.append(OutputFolder(recipe_index=0, format=name, folder=folder, summary={"bits": 4}))
    (assignment.work_folder / "report.json").write_text("{}")
    return Finished(report="report.json", outputs=tuple(outputs))


def surroundings(assignment: Assignment) -> dict[str, object]:
    return {"names": sorted(os.environ), "kernel_backend": assignment.kernel_backend}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress-fd", type=int, required=True)
    pipe = ProgressPipe(parser.parse_args().progress_fd)
    assignment = Assignment.model_validate_json(sys.stdin.read())
    pipe.send(Noted(code="environment", message="", detail=surroundings(assignment)))
    pipe.send(StageStarted(stage=Stage.CALIBRATING))
    try:
        value = compute(assignment, pipe)
        pipe.send(write_output(assignment, value))
    except OSError as fault:  # a full disk, which the engine's child reports so too
        pipe.send(Failed(error=Problem(code="worker_disk", message=str(fault), remedy="free space")))


if __name__ == "__main__":
    main()
