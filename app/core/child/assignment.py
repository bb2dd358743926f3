"""The protocol between a supervisor and its job child: one assignment in, JSON lines out.

The child sees folders and numbers only: no Redis address, no storage credentials, no keys. The same
protocol carries `nibble quantize`, where the terminal takes the supervisor's place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from app.core.formats.registry import FormatName
from app.core.planning.device_profile import DeviceProfile
from app.core.records.job import Problem, Stage
from app.core.records.specs import Frozen, JobSpec, Recipe
from app.core.sources.model_headers import merged_digest


class Assignment(Frozen):
    """All that the child needs. Folders exist; `work_folder` is private to this attempt."""

    spec: JobSpec
    model_folder: Path  # config.json, tokenizer files, *.safetensors
    model_name: str  # for people: model cards, the report
    model_digest: str  # sha256 over the model's files
    adapter_folder: Path | None = None  # of the adapter that is merged into the weights
    adapter_name: str | None = None
    adapter_digest: str | None = None  # sha256 over its files
    model_notes: tuple[str, ...] = ()  # what was left out of the model's folder, and why
    choices: tuple[str, ...] = ()  # of the service, where the job's body left something open
    calibration_digest: str  # of the calibration text's content
    calibration_file: Path | None = None  # fetched jsonl or text; None for builtin and inline
    evaluation_file: Path | None = None
    work_folder: Path  # checkpoints/ is restored before the start; output/ is made by the child
    device: str = "cpu"
    calibration_devices: tuple[str, ...] = ()  # further ones, that share the calibration pass
    kernel_backend: str = "auto"  # or the name of the one that must be used
    threads: int | None = None  # CPU threads; None leaves torch's choice
    shard_bytes: int = 4 * 1024**3
    profile: DeviceProfile | None = None  # of the device, for the report's prediction

    @property
    def weights_digest(self) -> str:
        """The identity of the weights that the run starts from."""
        return merged_digest(self.model_digest, self.adapter_digest)

    def layers_identity(self, recipes: Sequence[Recipe]) -> str:
        """The identity of layers finished for these recipes; without recipes, that of their statistics.

        Another model, adapter, text, recipe, kind of device or version of Nibble gives another identity.
        """
        calibration = self.spec.calibration.model_dump(exclude={"texts", "dataset"})
        return digest_of(
            [
                LAYERS_VERSION, version("nibble"), self.weights_digest, self.calibration_digest, calibration,
                self.device.partition(":")[0], [recipe.model_dump() for recipe in recipes],
            ]
        )  # fmt: skip


class StageStarted(Frozen):
    kind: Literal["stage"] = "stage"
    stage: Stage


class Progressed(Frozen):
    kind: Literal["progress"] = "progress"
    fraction: float
    layer: int | None = None
    layers: int | None = None
    eta_s: float | None = None


class Noted(Frozen):
    """Something a reader of the job should know: a fallback, a skipped layer, a chosen kernel."""

    kind: Literal["note"] = "note"
    code: str
    message: str
    detail: dict[str, Any] = Field(default_factory=dict)


class LayerErrors(Frozen):
    """Relative output errors of a solved layer: sums of loss / energy over its linears; None: not known."""

    recipe_index: int
    layer: int
    error: float | None
    error_of_rounding: float | None  # of plain rounding


class Checkpointed(Frozen):
    """A file under `work_folder/checkpoints` is complete; `replaces` may be deleted with it."""

    kind: Literal["checkpoint"] = "checkpoint"
    key: str  # relative path, the same on every attempt
    replaces: str | None = None
    layer: LayerErrors | None = None  # what the file holds, if it is a solved layer


class OutputFolder(Frozen):
    """One candidate in one format: a folder that a loader opens unchanged."""

    recipe_index: int
    recipe: Recipe | None = None  # None: the job's own of this index
    format: FormatName
    folder: str  # relative to work_folder
    summary: dict[str, Any]  # perplexity, ratio, bytes, bits per weight


class Finished(Frozen):
    kind: Literal["finished"] = "finished"
    report: str  # path of the report, relative to work_folder
    outputs: tuple[OutputFolder, ...]


class Failed(Frozen):
    kind: Literal["failed"] = "failed"
    error: Problem
    report: str | None = None  # path of a report on what was tried, relative to work_folder


ProgressMessage = Annotated[
    StageStarted | Progressed | Noted | Checkpointed | Finished | Failed, Field(discriminator="kind")
]
progress_messages: TypeAdapter[ProgressMessage] = TypeAdapter(ProgressMessage)


PREDICTION = "prediction"  # code of the note in whose detail a child says what it expects


def digest_of(value: object) -> str:
    """SHA-256 of a value as JSON, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


LAYERS_VERSION = 3  # of the files that hold finished layers
CHECKPOINTS = "checkpoints"
OUTPUT = "output"
REPORT = f"{OUTPUT}/report.json"
