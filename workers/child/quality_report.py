"""The report of a run, put together from what its steps returned."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from app.core.child.assignment import PREDICTION, Noted, digest_of
from app.core.jobs.report import (
    CacheReport,
    CandidateReport,
    LayerReport,
    OriginalReport,
    Quality,
    Report,
    TryReport,
)
from app.core.planning.cost_model import Prediction, predict
from app.core.planning.device_profile import NOMINAL, DeviceKind
from app.core.records.specs import TargetSpec, TextSpec
from kernels.search.search_operators import search_backend
from workers.child.judging import JudgedCandidate
from workers.child.layer_loop import SolvedLayers
from workers.child.stage_clock import StageClock
from workers.child.work import JobTexts, Work
from workers.devices.torch_process import status_bytes
from workers.texts.windows import Windows


@dataclass(frozen=True)
class RunResult:
    """The results of a run's steps."""

    solved: SolvedLayers
    original: Quality
    judged: list[JudgedCandidate]  # by recipe_index

    def chosen(self, target: TargetSpec | None) -> list[JudgedCandidate]:
        """The candidates to publish: all without a target; with one, the smallest that meets it, or of a
        target of bytes alone the one with the least error.

        If none does, the best one if misses are published, else nothing.
        """
        if target is None:
            return self.judged
        met = [judged for judged in self.judged if judged.excess(target) <= 1]
        if met and target.limits_quality:
            return [min(met, key=lambda judged: sum(judged.bytes.values()))]
        return [self.best(target)] if met or target.on_miss == "publish" else []

    def best(self, target: TargetSpec) -> JudgedCandidate:
        return min(self.judged, key=lambda judged: judged.rank(target))


def report_of(work: Work, texts: JobTexts, result: RunResult, clock: StageClock) -> Report:
    spec, target = work.spec, work.spec.target
    kind: DeviceKind = "cuda" if work.device.type == "cuda" else "cpu"
    return Report(
        model=work.assignment.model_name,
        model_digest=work.assignment.model_digest,
        adapter=work.assignment.adapter_name,
        adapter_digest=work.assignment.adapter_digest,
        source=work.checkpoint.source,
        calibration_digest=texts.calibration.digest,
        recipe_digests=tuple(digest_of(judged.candidate.recipe.model_dump()) for judged in result.judged),
        calibration={**text_entry(spec.calibration, texts.calibration), "seed": spec.calibration.seed},
        evaluation=text_entry(spec.judged_on, texts.evaluation),
        original=OriginalReport(perplexity=result.original.perplexity, bytes=work.plan.model_bytes),
        candidates=tuple(candidate_report(judged, target, clock) for judged in result.judged),
        published=tuple(judged.candidate.recipe_index for judged in result.chosen(target)),
        tries=() if target is None else tuple(try_report(judged, target, clock) for judged in result.judged),
        histograms=tuple(result.solved.histograms),
        prediction=prediction(work),
        stages=dict(clock.seconds),
        cpu_seconds=dict(clock.cpu_seconds),
        resumed_at_layer=result.solved.resumed_at,
        peak_rss_bytes=status_bytes("VmHWM"),
        peak_vram_bytes=torch.cuda.max_memory_allocated(work.device) if kind == "cuda" else None,
        environment=environment(work),
        notes=tuple(clock.notes),
    )


def prediction(work: Work) -> Prediction:
    """Of the recipes as asked, with the rates of the device."""
    kind: DeviceKind = "cuda" if work.device.type == "cuda" else "cpu"
    return predict(work.plan, work.spec, work.assignment.profile or NOMINAL[kind])


def prediction_note(work: Work) -> Noted:
    """The prediction as a note: a job that ends without a result is reported from its events."""
    expected = prediction(work)
    message = (
        f"{expected.total_seconds:.0f} s and {expected.ram_bytes / 1e9:.1f} GB of memory are expected "
        f"({expected.basis} rates)"
    )
    return Noted(code=PREDICTION, message=message, detail=expected.model_dump(mode="json"))


def candidate_report(
    judged: JudgedCandidate, target: TargetSpec | None, clock: StageClock
) -> CandidateReport:
    candidate = judged.candidate
    return CandidateReport(
        **dict(judged.quality),
        recipe_index=candidate.recipe_index,
        label=candidate.label,
        inputs=candidate.recipe.inputs,
        recipe=candidate.recipe,
        bytes=judged.bytes,
        bits_per_weight=candidate.bits_per_weight,
        meets_target=None if target is None else judged.excess(target) <= 1,
        verdict=None if target is None else judged.verdict(target),
        cache=cache_report(judged),
        gain_over_rounding=gain_over_rounding(judged.layers),
        seconds=dict(clock.candidate_seconds[candidate.recipe_index]),
        layers=tuple(judged.layers),
    )


def cache_report(judged: JudgedCandidate) -> CacheReport | None:
    """The range of the scales of a candidate's cache; None if it is not rounded."""
    numbers = judged.candidate.recipe.kv_cache
    scales = [layer.cache_scales for layer in judged.layers if layer.cache_scales is not None]
    if numbers is None or not scales:
        return None
    keys, values = ([getattr(each, name) for each in scales] for name in ("key", "value"))
    return CacheReport(
        numbers=numbers,
        layers=len(scales),
        key_scales=(min(keys), max(keys)),
        value_scales=(min(values), max(values)),
    )


def try_report(judged: JudgedCandidate, target: TargetSpec, clock: StageClock) -> TryReport:
    candidate = judged.candidate
    return TryReport(
        **dict(judged.quality),
        rung=judged.rung,
        reason=judged.reason,
        recipe_index=candidate.recipe_index,
        label=candidate.label,
        recipe=candidate.recipe,
        bytes=judged.bytes,
        bits_per_weight=candidate.bits_per_weight,
        seconds=sum(clock.candidate_seconds[candidate.recipe_index].values()),
        meets_target=judged.excess(target) <= 1,
        verdict=judged.verdict(target),
    )


def gain_over_rounding(layers: Iterable[LayerReport]) -> float | None:
    """How much lower the expected output errors are than plain rounding's at the same bits and groups."""
    errors = [
        (linear.loss / linear.energy, linear.loss_rounding / linear.energy)
        for layer in layers
        for linear in layer.linears
        if linear.loss is not None and linear.loss_rounding is not None and linear.energy
    ]
    own, plain = (sum(column) for column in zip(*errors, strict=True)) if errors else (0.0, 0.0)
    return 1 - own / plain if plain > 0 else None


def text_entry(spec: TextSpec, windows: Windows) -> dict[str, Any]:
    """The report's entry on a text and how much of it was read."""
    return {
        "dataset": spec.source,
        "windows": windows.tokens.shape[0],
        "windows_available": windows.available,
        "sequence_length": windows.tokens.shape[1],
        "digest": windows.digest,
    }


def environment(work: Work) -> dict[str, Any]:
    """The report's entry on the run's device and the versions of its programs."""
    on_gpu = work.device.type == "cuda"
    return {
        "nibble": version("nibble"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": str(work.device),
        "device_name": torch.cuda.get_device_name(work.device) if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "compute_dtype": str(work.compute_dtype).removeprefix("torch."),
        "search_backend": search_backend(work.device),
        **({"lm_eval": version("lm_eval")} if work.spec.tasks else {}),
    }
