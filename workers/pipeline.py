"""A job from model folder to checked output folders: the steps on one page.

    read text -> calibrate and search, layer by layer -> pack -> verify -> evaluate -> report

A finished layer is a checkpoint; a run that finds checkpoints of the same work goes on after them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from app.core.assignment import (
    CHECKPOINTS,
    OUTPUT,
    Assignment,
    Finished,
    Noted,
    OutputFolder,
    Progressed,
    ProgressMessage,
    StageStarted,
)
from app.core.errors import TargetMissed, VerificationFailed
from app.core.job import Stage
from app.core.plan import CandidatePlan, Plan, plan_job
from app.core.report import (
    CandidateReport,
    LayerReport,
    LinearReport,
    OriginalReport,
    Report,
    WeightHistogram,
)
from workers.formats.folder import FormatFolder
from workers.layer_checkpoints import LayerCheckpoints, identity_digest, resume_layer
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.quality_report import (
    Outcome,
    candidate_reports,
    environment,
    peak_rss_bytes,
    peak_vram_bytes,
    text_entry,
)
from workers.quantization.calibration import EQUIVALENCE_LIMIT, CalibrationPass, equivalence_error
from workers.quantization.evaluation import Quality, evaluate
from workers.quantization.histograms import weight_histogram
from workers.quantization.input_statistics import InputStatistics
from workers.quantization.layer import LayerTask, quantize_layer
from workers.texts.windows import Windows, calibration_windows, evaluation_windows, load_tokenizer

Send = Callable[[ProgressMessage], None]
BATCH_TOKENS = 8192
STATES_INTERVAL_S = 20.0  # hidden states are large: losing up to this much forward time costs less


class Pipeline:
    """One run of one assignment."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        self.assignment, self.spec, self.send = assignment, assignment.spec, send
        self.device = torch.device(assignment.device)
        self.checkpoint = Checkpoint(assignment.model_folder)
        self.plan: Plan = plan_job(self.spec, self.checkpoint.config, self.checkpoint.tensors)
        self.weight_dtype: torch.dtype = getattr(torch, self.plan.dtype)
        self.compute_dtype = torch.float32 if self.device.type == "cpu" else self.weight_dtype
        self.seconds: dict[str, float] = {}
        self.candidate_seconds: list[dict[str, float]] = [{} for _ in self.plan.candidates]
        self.histograms: list[WeightHistogram] = []
        self.notes: list[str] = []
        self.started = time.monotonic()

    def run(self) -> Finished:
        """The whole job. Raises NibbleError with the reason when it can't succeed."""
        for message in self.plan.notes:
            self.note("plan", message)
        calibration, evaluation = self.read_texts()
        checkpoints = self.open_checkpoints(calibration)
        resumed_at = self.quantize_layers(calibration, checkpoints)
        folders = self.write_folders(checkpoints)
        qualities = self.evaluate(evaluation, folders)
        outcome = Outcome(
            qualities=qualities,
            layers=[
                [
                    checkpoints.layer_report(candidate.recipe_index, layer)
                    for layer in range(self.plan.num_layers)
                ]
                for candidate in self.plan.candidates
            ],
            folders=folders,
            seconds=self.candidate_seconds,
            resumed_at=resumed_at,
        )
        return self.finish(outcome, calibration, evaluation)

    # --- steps

    def read_texts(self) -> tuple[Windows, Windows]:
        with self.stage(Stage.FETCHING):
            tokenizer = load_tokenizer(self.assignment.model_folder)
            calibration = calibration_windows(
                self.spec.calibration, tokenizer, self.assignment.calibration_file
            )
            evaluation = evaluation_windows(
                self.spec.evaluation, self.spec.calibration.sequence_length, tokenizer,
                self.assignment.evaluation_file,
            )  # fmt: skip
        return calibration, evaluation

    def open_checkpoints(self, calibration: Windows) -> LayerCheckpoints:
        identity = identity_digest(
            model=self.assignment.model_digest,
            tokens=calibration.digest,
            recipes=[recipe.model_dump() for recipe in self.spec.recipes],
            device=self.device.type,
            dtype=str(self.compute_dtype),
        )
        return LayerCheckpoints(self.assignment.work_folder / CHECKPOINTS, identity, self.send)

    def quantize_layers(self, calibration: Windows, checkpoints: LayerCheckpoints) -> int:
        """Calibrate, search and round every layer; the layer at which a resumed run went on."""
        resumed_at = resume_layer(checkpoints, self.plan.num_layers, len(self.plan.candidates))
        if resumed_at:
            self.note("resumed", f"{resumed_at} of {self.plan.num_layers} layers were finished before")
        if resumed_at == self.plan.num_layers:
            return resumed_at
        batches = calibration.batches(max(1, BATCH_TOKENS // self.spec.calibration.sequence_length))
        decoder = Decoder(self.checkpoint, self.plan.architecture, self.device, self.compute_dtype)
        with self.stage(Stage.CALIBRATING):
            run = CalibrationPass(decoder, batches)
            saved = checkpoints.latest_states(resumed_at)
            if saved is not None:
                run.restore(*saved)
            while run.layer < resumed_at:
                run.skip()
        states_saved = time.monotonic()
        for layer in range(resumed_at, self.plan.num_layers):
            self.quantize_next_layer(run, checkpoints)
            if layer + 1 < self.plan.num_layers and time.monotonic() - states_saved > STATES_INTERVAL_S:
                checkpoints.save_states(layer + 1, run.states)
                states_saved = time.monotonic()
            self.progress(0.6 * (layer + 1) / self.plan.num_layers, layer + 1)
        return resumed_at

    def quantize_next_layer(self, run: CalibrationPass, checkpoints: LayerCheckpoints) -> None:
        """One layer for every recipe, from the same statistics."""
        layer = run.layer
        with self.stage(Stage.CALIBRATING):
            weights = run.decoder.layer_weights(layer)
            statistics, *probe = run.collect(weights)
        full = {name: value.to(self.device, torch.float32) for name, value in weights.items()}
        prefix = self.plan.architecture.layer_prefix(layer)
        self.histograms += [
            weight_histogram(prefix + name, full[name + ".weight"]) for name in self.plan.architecture.linears
        ]
        for candidate in self.plan.candidates:
            with self.stage(Stage.SEARCHING, candidate.recipe_index):
                started = time.monotonic()
                task = self.layer_task(candidate, layer, full, statistics)
                result, folded = quantize_layer(task)
                error = equivalence_error(run, layer, folded, (probe[0], probe[1]))
                self.check_equivalence(candidate, layer, error)
                report = LayerReport(
                    layer=layer,
                    seconds=time.monotonic() - started,
                    equivalence_error=error,
                    linears=(*result.report, *self.kept_linears(candidate, layer)),
                )
                checkpoints.save_layer(candidate.recipe_index, result, report)

    def layer_task(
        self,
        candidate: CandidatePlan,
        layer: int,
        weights: dict[str, Tensor],
        statistics: list[InputStatistics],
    ) -> LayerTask:
        prefix = self.plan.architecture.layer_prefix(layer)
        schemes = {
            linear.name.removeprefix(prefix): linear.scheme
            for linear in candidate.linears
            if linear.name.startswith(prefix) and linear.scheme is not None
        }
        config = self.checkpoint.config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return LayerTask(
            self.plan.architecture,
            candidate.recipe,
            schemes,
            head_dim,
            weights,
            statistics,
            self.weight_dtype,
        )

    def check_equivalence(self, candidate: CandidatePlan, layer: int, error: float) -> None:
        """Scales that change the model's function must never reach a file."""
        limit = EQUIVALENCE_LIMIT[self.compute_dtype]
        if not error <= limit:
            raise VerificationFailed(
                f"recipe {candidate.recipe_index}, layer {layer}: the scaled, unrounded layer differs from "
                f"the original by {error:.2e} (limit {limit:.0e})",
                code="equivalence_failed", remedy="use method rtn, and report the model's architecture",
            )  # fmt: skip

    def kept_linears(self, candidate: CandidatePlan, layer: int) -> Iterator[LinearReport]:
        prefix = self.plan.architecture.layer_prefix(layer)
        for linear in candidate.linears:
            if linear.name.startswith(prefix) and linear.scheme is None:
                yield LinearReport(linear=linear.name.removeprefix(prefix), bits=None, reason=linear.reason)

    def write_folders(self, checkpoints: LayerCheckpoints) -> list[list[FormatFolder]]:
        """Every candidate in every format, written and read back."""
        folders = []
        for candidate in self.plan.candidates:
            load_layer = partial(checkpoints.load_layer, candidate.recipe_index)
            row = []
            for name in self.spec.formats:
                folder = FormatFolder(
                    self.assignment.work_folder / OUTPUT / f"{candidate.recipe_index}-{name}",
                    name, self.checkpoint, self.plan, candidate,
                )  # fmt: skip
                with self.stage(Stage.PACKING, candidate.recipe_index):
                    folder.write(load_layer, self.assignment.shard_bytes)
                with self.stage(Stage.VERIFYING, candidate.recipe_index):
                    folder.verify(load_layer)
                row.append(folder)
            folders.append(row)
            self.progress(0.6 + 0.1 * len(folders) / len(self.plan.candidates), self.plan.num_layers)
        return folders

    def evaluate(self, windows: Windows, folders: list[list[FormatFolder]]) -> list[Quality]:
        """The original and every candidate, as its first format's files say it is."""
        with self.stage(Stage.EVALUATING):
            decoder = Decoder(self.checkpoint, self.plan.architecture, self.device, self.compute_dtype)
            models = [decoder.layer_weights]
            models += [partial(row[0].read_weights, Checkpoint(row[0].folder)) for row in folders]
            batches = windows.batches(max(1, BATCH_TOKENS // self.spec.calibration.sequence_length))
            total = self.plan.num_layers
            return evaluate(
                decoder, batches, models, lambda layer: self.progress(0.7 + 0.29 * (layer + 1) / total, total)
            )

    def finish(self, outcome: Outcome, calibration: Windows, evaluation: Windows) -> Finished:
        """Write the report and name the folders that may be published.

        Raises TargetMissed if no candidate meets the target and misses are not to be published.
        """
        reports = candidate_reports(self.spec, self.plan, outcome)
        path = self.assignment.work_folder / OUTPUT / "report.json"
        path.write_text(
            self.report(reports, outcome, calibration, evaluation).model_dump_json(indent=1), "utf-8"
        )
        target = self.spec.target
        chosen = [
            r for r in reports if r.meets_target is not False or (target and target.on_miss == "publish")
        ]
        if target is not None and not chosen:
            best = min(reports, key=lambda r: r.perplexity_ratio)
            raise TargetMissed(
                f"the best candidate ({best.label}) has {best.perplexity_ratio:.4f} times the original's "
                f"perplexity; at most {target.max_perplexity_ratio} was asked for",
                remedy="use more bits or smaller groups, or set target.on_miss to publish",
            )
        outputs = tuple(
            OutputFolder(
                recipe_index=r.recipe_index,
                format=folder.name,
                folder=str(folder.folder.relative_to(self.assignment.work_folder)),
                summary={
                    "label": r.label,
                    "perplexity": r.perplexity,
                    "perplexity_ratio": r.perplexity_ratio,
                    "kl": r.kl,
                    "bytes": r.bytes[folder.name],
                    "bits_per_weight": r.bits_per_weight,
                },
            )
            for r in chosen
            for folder in outcome.folders[r.recipe_index]
        )
        return Finished(report=str(path.relative_to(self.assignment.work_folder)), outputs=outputs)

    def report(
        self, candidates: list[CandidateReport], outcome: Outcome, calibration: Windows, evaluation: Windows
    ) -> Report:
        return Report(
            model=self.assignment.model_name,
            model_digest=self.assignment.model_digest,
            calibration_digest=calibration.digest,
            recipe_digests=tuple(identity_digest(**recipe.model_dump()) for recipe in self.spec.recipes),
            calibration={
                **text_entry(self.spec.calibration, calibration),
                "seed": self.spec.calibration.seed,
                "inputs": "full-precision chain",
            },
            evaluation=text_entry(self.spec.evaluation, evaluation),
            original=OriginalReport(perplexity=outcome.qualities[0].perplexity, bytes=self.plan.model_bytes),
            candidates=tuple(candidates),
            histograms=tuple(self.histograms),
            stages=self.seconds,
            resumed_at_layer=outcome.resumed_at,
            peak_rss_bytes=peak_rss_bytes(),
            peak_vram_bytes=peak_vram_bytes(self.device),
            environment=environment(self.device, self.compute_dtype),
            notes=tuple(self.notes),
        )

    # --- telling the supervisor

    @contextmanager
    def stage(self, stage: Stage, candidate: int | None = None) -> Iterator[None]:
        """Announce a stage and count its seconds, of the job and of the candidate it serves."""
        self.send(StageStarted(stage=stage))
        started = time.monotonic()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent = time.monotonic() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
            if candidate is not None:
                own = self.candidate_seconds[candidate]
                own[stage] = own.get(stage, 0.0) + spent

    def progress(self, fraction: float, layer: int) -> None:
        spent = time.monotonic() - self.started
        self.send(
            Progressed(
                fraction=fraction,
                layer=layer,
                layers=self.plan.num_layers,
                eta_s=round(spent / fraction * (1 - fraction), 1),
            )
        )

    def note(self, code: str, message: str) -> None:
        self.notes.append(message)
        self.send(Noted(code=code, message=message))
