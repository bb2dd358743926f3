"""Several devices of one host on one job: each passes a share of the calibration batches through the models.

Rank 0 is the job child; it searches, rounds and writes. The others follow it layer by layer: with their
batches through the original model, of which they may run ahead, and through the quantized copy of each
recipe that has one, for which they wait for its weights. torch.distributed adds up and hands out.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from app.core.child.assignment import Assignment
from app.core.child.owned_process import OwnedProcess, exit_words
from app.core.planning.plan import CandidatePlan
from app.core.records.specs import Frozen
from workers.child.layer_files import LayerCheckpoints
from workers.child.stage_clock import StageClock
from workers.child.work import Work
from workers.quantization.calibration import CalibrationPass
from workers.quantization.reduction import ALONE, Ranks
from workers.texts.windows import Windows

PATIENCE = timedelta(hours=1)  # a rank waits while the first one searches
MODULE = "workers.child.calibration_rank"


class SharedLayers(Frozen):
    """The work of all ranks: pass their batches through layers from `start` to before `stop`."""

    start: int
    stop: int
    calibrates: bool = True  # through the original model, for statistics
    moments: bool = True  # whether anybody reads those of the original's inputs
    candidates: tuple[CandidatePlan, ...] = ()  # through their own chains, in order

    @classmethod
    def of(
        cls,
        layers: range,
        candidates: Sequence[CandidatePlan] = (),
        *,
        calibrates: bool = True,
        moments: bool = True,
    ) -> SharedLayers:
        """With those of the candidates that have a chain of their own; no `moments` if no other reads any."""
        chained = tuple(candidate for candidate in candidates if candidate.recipe.has_own_chain)
        moments = moments or any(
            candidate.recipe.searches_scales or not candidate.recipe.has_own_chain for candidate in candidates
        )
        return cls(
            start=layers.start, stop=layers.stop, calibrates=calibrates, moments=moments, candidates=chained
        )

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)

    @property
    def is_empty(self) -> bool:
        return not (self.calibrates or self.candidates)


class RankAssignment(Frozen):
    """The assignment that the process of a further device reads at its start."""

    assignment: Assignment
    shared: SharedLayers
    rank: int
    size: int
    rendezvous: Path


@contextmanager
def joined(rank: int, size: int, rendezvous: Path, device: torch.device) -> Iterator[Ranks]:
    """Be one of the ranks that meet at the file `rendezvous`, with a device that is selected."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()


def devices_of(assignment: Assignment, num_batches: int) -> tuple[str, ...]:
    """Those that have at least one batch each; the first is the job child's."""
    return (assignment.device, *assignment.calibration_devices)[: max(1, num_batches)]


@contextmanager
def started(work: Work, calibration: Windows, shared: SharedLayers, clock: StageClock) -> Iterator[Ranks]:
    """The ranks of a job, with a process for each further device.

    A process that fails ends this one: no sum would ever be whole.
    """
    assignment = work.assignment
    devices = devices_of(assignment, len(work.batches(calibration)))
    if assignment.calibration_devices and not shared.is_empty:
        note_devices(assignment, devices, shared, clock)
    if len(devices) == 1 or shared.is_empty:
        yield ALONE
        return
    with tempfile.TemporaryDirectory(dir=assignment.work_folder) as folder:
        rendezvous = Path(folder) / "rendezvous"
        others = [
            start_rank(
                RankAssignment(
                    assignment=assignment.model_copy(update={"device": device}),
                    shared=shared,
                    rank=rank,
                    size=len(devices),
                    rendezvous=rendezvous,
                )
            )
            for rank, device in enumerate(devices)
            if rank
        ]
        try:
            with joined(0, len(devices), rendezvous, torch.device(assignment.device)) as ranks:
                yield ranks
            for process in others:
                process.wait()
        finally:
            for process in others:
                process.close()


def note_devices(
    assignment: Assignment, devices: tuple[str, ...], shared: SharedLayers, clock: StageClock
) -> None:
    """Note the work of the further devices, and the work that is left to the first."""
    if len(devices) > 1:
        learns = any(candidate.recipe.method == "omniquant" for candidate in shared.candidates)
        alone = "searches, rounds and learns" if learns else "searches and rounds"
        clock.note(
            "devices", f"{', '.join(devices)} share the calibration batches; {devices[0]} alone {alone}"
        )
    idle = 1 + len(assignment.calibration_devices) - len(devices)
    if idle:
        clock.note(
            "devices_idle", f"the text has {len(devices)} calibration batches: {idle} devices stay idle"
        )


def start_pass(
    work: Work, calibration: Windows, checkpoints: LayerCheckpoints, layer: int, ranks: Ranks = ALONE
) -> CalibrationPass:
    """A rank's pass, brought before `layer` from the hidden states that were saved nearest to it."""
    run = CalibrationPass(work.decoder(), work.batches(calibration), ranks)
    run.sees_caches = any(recipe.kv_cache is not None for recipe in work.spec.recipes)
    saved = checkpoints.latest_states(layer) if run.can_restore else None
    if saved is not None:
        run.restore(*saved)
    while run.layer < layer:
        run.skip()
    return run


def start_rank(rank: RankAssignment) -> OwnedProcess:
    process = OwnedProcess([MODULE], stdin=rank.model_dump_json().encode(), on_line=write_line)
    threading.Thread(target=end_with, args=(process, rank.rank), daemon=True).start()
    return process


def end_with(process: OwnedProcess, rank: int) -> None:
    """End this process if the other one fails by itself."""
    code = process.wait()
    if code and not process.is_closing:
        process.close()  # its last lines come first
        write_line(f"calibration rank {rank} ended with {exit_words(code)}")
        os._exit(1)


def write_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
