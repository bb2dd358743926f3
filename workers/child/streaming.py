"""A job that is not evaluated: every tensor is read, rounded if it is a linear's, and written, one by one.

No layer is built and no text is read, so any checkpoint will do. Threads take slices of rows, so reading,
rounding and writing overlap and memory holds a few slices. A finished file is a checkpoint; a run that finds
those of the same work goes on after them.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from app.core.child.assignment import (
    CHECKPOINTS,
    OUTPUT,
    PREDICTION,
    REPORT,
    Assignment,
    Checkpointed,
    Finished,
    Noted,
    OutputFolder,
    Progressed,
    digest_of,
)
from app.core.formats.registry import FormatName
from app.core.formats.targets import fused_by_name
from app.core.jobs.report import CandidateReport, LinearReport, OriginalReport, Report
from app.core.planning.cost_model import Prediction, predict
from app.core.planning.device_profile import NOMINAL
from app.core.planning.model_free import StreamedPlan, plan_model_free
from app.core.planning.plan import CandidatePlan, LinearPlan
from app.core.records.job import Stage
from kernels import fallbacks
from workers.child.stage_clock import Send, StageClock
from workers.devices.torch_process import status_bytes
from workers.formats.streamed_folder import Conversion, StreamedFile, StreamedFolder
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.row_reader import RowReader
from workers.modeling.stored_dtypes import DTYPES
from workers.quantization.float_grids import group_sizes
from workers.quantization.grid import group_ranges
from workers.quantization.row_rounding import RowRounder, WeightError, joined, row_slices, weight_error

COPIED_BYTES = 1 << 21  # of a tensor that keeps its precision, at a time
WAITING_THREADS = 2  # more threads than processors: some wait for the disk
PROGRESS_S = 0.5
NONE = WeightError(0.0, 0.0)


class Converted(NamedTuple):
    """Of a task: the bytes of the original that it took, and of which linear what error."""

    size: int
    linear: str = ""
    error: WeightError = NONE


Task = Callable[[], Converted]


@dataclass
class Streaming:
    """The state of a run."""

    assignment: Assignment
    plan: StreamedPlan
    source: Checkpoint
    reader: RowReader
    pool: ThreadPoolExecutor
    clock: StageClock
    total: int  # bytes to read, over all candidates and formats
    done: int = 0
    restored: int = 0  # files of an earlier attempt
    shown: float = 0.0
    errors: dict[tuple[int, str], WeightError] = field(default_factory=dict)  # by recipe and linear

    def advance(self, size: int) -> None:
        """Note that so many bytes of the original are done."""
        self.done += size
        now = time.monotonic()
        if now - self.shown < PROGRESS_S or self.total == 0:
            return
        self.shown, share = now, self.done / self.total
        left = (now - self.clock.started) * (1 - share) / max(share, 1e-9)
        self.clock.send(Progressed(fraction=share, eta_s=round(left, 1)))


def run_model_free(assignment: Assignment, send: Send) -> Finished:
    """The whole job. Raises NibbleError with the reason when it can't succeed."""
    torch.set_num_threads(1)  # each thread of the pool takes a processor
    source = Checkpoint.original(assignment.model_folder, assignment.adapter_folder)
    plan = plan_model_free(assignment.spec, source.config, source.tensors)
    source = source.with_experts(plan.stored_layers, plan.kinds)
    clock = StageClock(send, torch.device("cpu"), plan.num_layers)
    say_beginning(assignment, plan, clock)
    formats = assignment.spec.formats
    total = len(plan.candidates) * len(formats) * sum(header.size for header in source.tensors.values())
    threads = assignment.threads or os.cpu_count() or 1
    with (
        RowReader(source) as reader,
        ThreadPoolExecutor(threads + WAITING_THREADS, initializer=partial(torch.set_num_threads, 1)) as pool,
    ):
        run = Streaming(assignment, plan, source, reader, pool, clock, total)
        try:
            with clock.stage(Stage.PACKING):
                folders = {
                    (candidate.recipe_index, name): write_folder(run, candidate, name)
                    for candidate in plan.candidates
                    for name in formats
                }
        finally:
            pool.shutdown(cancel_futures=True)
    for sentence in fallbacks.noted():
        clock.note("kernel_fallback", sentence)
    report = report_of(run, folders)
    (assignment.work_folder / REPORT).write_text(report.model_dump_json(indent=1), "utf-8")
    outputs = tuple(
        output_of(run, next(each for each in report.candidates if each.recipe_index == index), folder)
        for (index, _), folder in folders.items()
    )
    return Finished(report=REPORT, outputs=outputs)


def say_beginning(assignment: Assignment, plan: StreamedPlan, clock: StageClock) -> None:
    expected = prediction(assignment, plan)
    message = f"{expected.total_seconds:.0f} s and {expected.ram_bytes / 1e9:.1f} GB of memory are expected"
    clock.send(Noted(code=PREDICTION, message=message, detail=expected.model_dump(mode="json")))
    for message in assignment.model_notes:
        clock.note("model_files", message)
    for message in (*assignment.choices, *plan.notes):
        clock.note("plan", message)
    clock.note("not_evaluated", "the job asks for no evaluation: nothing is known of the model's quality")


def prediction(assignment: Assignment, plan: StreamedPlan) -> Prediction:
    return predict(plan, assignment.spec, assignment.profile or NOMINAL["cpu"])


def write_folder(run: Streaming, candidate: CandidatePlan, name: FormatName) -> StreamedFolder:
    """One candidate in one format: its files in order, each checked and announced when it is whole."""
    parent = run.assignment.work_folder / OUTPUT
    folder = StreamedFolder(
        parent / f"{candidate.recipe_index}-{name}", name, run.source, candidate, run.assignment.shard_bytes
    )
    folder.open()
    for file in folder.files:
        shard = ShardCheckpoint.of(run, folder, file)
        errors = shard.restore()
        if errors is None:
            errors = write_file(run, folder, file)
            shard.keep(errors)
            for key in (shard.errors_key, shard.key):  # the file comes last: with it all is there
                run.clock.send(Checkpointed(key=key))
        else:
            run.restored += 1
            run.advance(sum(run.source.header(each.name).size for each in file.conversions))
        run.errors |= {(candidate.recipe_index, linear): error for linear, error in errors.items()}
    return folder


@dataclass(frozen=True)
class ShardCheckpoint:
    """A finished file under another name among the checkpoints, and its errors beside it."""

    folder: Path  # of the checkpoints
    key: str
    file: StreamedFile

    @classmethod
    def of(cls, run: Streaming, folder: StreamedFolder, file: StreamedFile) -> ShardCheckpoint:
        key = f"recipe-{folder.candidate.recipe_index:02d}-{folder.name}-{file.path.name}"
        return cls(run.assignment.work_folder / CHECKPOINTS, key, file)

    @property
    def errors_key(self) -> str:
        return f"{self.key}.json"

    def restore(self) -> dict[str, WeightError] | None:
        """The errors, with the file in its place; None if there is none that is whole."""
        stored, errors = self.folder / self.key, self.folder / self.errors_key
        if not errors.exists() or not self.file.is_whole(stored):
            return None
        self.file.path.unlink(missing_ok=True)
        os.link(stored, self.file.path)
        return {name: WeightError(*sums) for name, sums in json.loads(errors.read_text("utf-8")).items()}

    def keep(self, errors: dict[str, WeightError]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / self.errors_key).write_text(json.dumps(errors), "utf-8")
        (self.folder / self.key).unlink(missing_ok=True)
        os.link(self.file.path, self.folder / self.key)


def write_file(run: Streaming, folder: StreamedFolder, file: StreamedFile) -> dict[str, WeightError]:
    """Convert the tensors of a file and read it back whole; the errors by linear."""
    largest = largest_sizes(run, folder, file)
    errors: dict[str, WeightError] = {}
    file.open()
    try:
        tasks = [task for each in file.conversions for task in tasks_of(run, folder, file, each, largest)]
        for outcome in run.pool.map(lambda task: task(), tasks):
            run.advance(outcome.size)
            if outcome.linear:
                errors[outcome.linear] = errors.get(outcome.linear, NONE) + outcome.error
        with run.clock.counted(Stage.VERIFYING):
            for _ in run.pool.map(file.check, file.stretches):
                pass
        file.finish()
    finally:
        file.close()
    return errors


def largest_sizes(run: Streaming, folder: StreamedFolder, file: StreamedFile) -> dict[str, Tensor]:
    """By linear of the file, of a scheme with one divisor for a matrix: the largest size of the weights that
    servers make that matrix of."""
    divided = [
        name
        for name, linear in folder.linears.items()
        if linear.scheme and linear.scheme.kind.scales == "e4m3"
    ]
    sets: dict[str, tuple[str, ...]] = {name: (name,) for name in divided}
    for names in fused_by_name(divided):
        for parent in {name.rpartition(".")[0] for name in names}:  # of experts each its own
            alike = tuple(name for name in names if name.rpartition(".")[0] == parent)
            sets |= dict.fromkeys(alike, alike)
    here = {each.linear.name for each in file.conversions if each.linear is not None} & sets.keys()
    needed = sorted({name for linear in here for name in sets[linear]})
    sizes = dict(zip(needed, run.pool.map(partial(largest_size, run), needed), strict=True))
    return {linear: torch.stack([sizes[name] for name in sets[linear]]).amax() for linear in here}


def largest_size(run: Streaming, linear: str) -> Tensor:
    slices = (group_sizes(*group_ranges(values)).amax() for _, values in slices_of(run, linear))
    return torch.stack(list(slices)).amax()


def slices_of(run: Streaming, linear: str) -> Iterator[tuple[int, Tensor]]:
    """The rows of a linear's weight, with the number of the first."""
    name = f"{linear}.weight"
    rows, columns = run.source.tensors[name].shape
    whole = None if run.reader.is_plain(name) else run.source.tensor(name)
    for start, stop in row_slices(rows, columns):
        yield start, run.reader.rows(name, start, stop) if whole is None else whole[start:stop]


def tasks_of(
    run: Streaming,
    folder: StreamedFolder,
    file: StreamedFile,
    conversion: Conversion,
    largest: dict[str, Tensor],
) -> Iterator[Task]:
    """What is to be done for a tensor: slice by slice where that is possible."""
    header, linear = run.source.header(conversion.name), conversion.linear
    if linear is None:
        if not run.reader.is_plain(conversion.name):
            yield partial(copy_decoded, run, file, conversion.name)
            return
        for start in range(0, header.size, COPIED_BYTES):
            stop = min(start + COPIED_BYTES, header.size)
            yield partial(copy, run, file, conversion.name, (start, stop))
        return
    assert linear.scheme is not None
    dtype = DTYPES[header.dtype]
    rounder = RowRounder(
        linear.name, linear.scheme, dtype, folder.in_float16(dtype), largest.get(linear.name)
    )
    if folder.by_rows and run.reader.is_plain(conversion.name):
        for rows in row_slices(linear.out_features, linear.in_features):
            yield partial(round_rows, run, folder, file, (linear, rounder, rows))
    else:
        yield partial(round_whole, run, folder, file, (linear, rounder))


def copy(run: Streaming, file: StreamedFile, name: str, span: tuple[int, int]) -> Converted:
    """Bytes of a tensor as they are."""
    values = run.reader.raw(name, *span)
    file.write(name, span[0], values)
    return Converted(values.numel())


def copy_decoded(run: Streaming, file: StreamedFile, name: str) -> Converted:
    """A tensor that is stored in another form than the output's."""
    offset = 0
    for chunk in run.source.chunks(name):
        file.write(name, offset, chunk)
        offset += chunk.nbytes
    return Converted(offset)


def round_rows(
    run: Streaming,
    folder: StreamedFolder,
    file: StreamedFile,
    slice_of: tuple[LinearPlan, RowRounder, tuple[int, int]],
) -> Converted:
    """Some rows of a linear."""
    linear, rounder, (start, stop) = slice_of
    values = run.reader.rows(f"{linear.name}.weight", start, stop)
    rounded = rounder(values)
    folder.write_rows(file, linear, start, rounded)
    return Converted(values.nbytes, linear.name, weight_error(values, rounded))


def round_whole(
    run: Streaming, folder: StreamedFolder, file: StreamedFile, matrix: tuple[LinearPlan, RowRounder]
) -> Converted:
    """A linear whose rows do not lie by themselves, in the original or in the output."""
    linear, rounder = matrix
    error, slices, size = NONE, [], 0
    for _, values in slices_of(run, linear.name):
        slices.append(rounder(values))
        error += weight_error(values, slices[-1])
        size += values.nbytes
    folder.write_rows(file, linear, 0, joined(slices))
    return Converted(size, linear.name, error)


def report_of(run: Streaming, folders: dict[tuple[int, FormatName], StreamedFolder]) -> Report:
    assignment, plan = run.assignment, run.plan
    return Report(
        model=assignment.model_name,
        model_digest=assignment.model_digest,
        adapter=assignment.adapter_name,
        adapter_digest=assignment.adapter_digest,
        source=run.source.source,
        recipe_digests=tuple(digest_of(each.recipe.model_dump()) for each in plan.candidates),
        original=OriginalReport(bytes=plan.model_bytes),
        candidates=tuple(candidate_report(run, each, folders) for each in plan.candidates),
        published=tuple(candidate.recipe_index for candidate in plan.candidates),
        prediction=prediction(assignment, plan),
        stages=dict(run.clock.seconds),
        cpu_seconds=dict(run.clock.cpu_seconds),
        peak_rss_bytes=status_bytes("VmHWM"),
        peak_vram_bytes=None,
        environment={
            "nibble": version("nibble"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": "cpu",
            "device_name": platform.processor() or "cpu",
            "restored_files": run.restored,
        },
        notes=tuple(run.clock.notes),
    )


def candidate_report(
    run: Streaming, candidate: CandidatePlan, folders: dict[tuple[int, FormatName], StreamedFolder]
) -> CandidateReport:
    index = candidate.recipe_index
    return CandidateReport(
        recipe_index=index,
        label=candidate.label,
        recipe=candidate.recipe,
        bytes={name: folder.weight_bytes for (own, name), folder in folders.items() if own == index},
        bits_per_weight=candidate.bits_per_weight,
        seconds={},
        linears=tuple(linear_reports(candidate.linears, run.errors, index)),
    )


def linear_reports(
    linears: Sequence[LinearPlan], errors: dict[tuple[int, str], WeightError], index: int
) -> Iterator[LinearReport]:
    for linear in linears:
        scheme, error = linear.scheme, errors.get((index, linear.name))
        yield LinearReport(
            linear=linear.name,
            bits=None if scheme is None else scheme.bits,
            group_size=None if scheme is None else scheme.group_size,
            scheme=None if scheme is None or scheme.is_plain else scheme.name,
            reason=linear.reason,
            weight_error=None if error is None else error.relative,
        )


def output_of(run: Streaming, candidate: CandidateReport, folder: StreamedFolder) -> OutputFolder:
    return OutputFolder(
        recipe_index=candidate.recipe_index,
        recipe=candidate.recipe,
        format=folder.name,
        folder=str(folder.folder.relative_to(run.assignment.work_folder)),
        summary={
            "label": candidate.label,
            "bits_per_weight": candidate.bits_per_weight,
            "bytes": folder.weight_bytes,
        },
    )
