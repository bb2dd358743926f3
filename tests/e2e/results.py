"""Results of jobs that were not run: a report with figures that a page can show, and what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from app.core.jobs.job_store import JobStore
from app.core.jobs.report import (
    CandidateReport,
    Interval,
    LayerReport,
    LinearReport,
    OriginalReport,
    Report,
    WeightHistogram,
)
from app.core.planning.cost_model import Prediction
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress, ResourceUse, ResultFigures, transition
from app.core.records.specs import JobSpec, Recipe
from app.core.settings import Settings
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import report_key
from tests.e2e.installed import Service

ORIGINAL_BYTES = 11_500_000
ORIGINAL_PERPLEXITY = 42.0
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LAYERS = 6
# Sizes and perplexities as close together as real ones.
RECIPES: list[dict[str, Any]] = [
    {"method": "rtn"}, {"method": "awq"}, {"method": "awq", "rounding": "gptq"},
    {"method": "awq", "rounding": "gptq", "bits": 3},
    {"method": "rtn", "bits": 8}, {"method": "gptq", "bits": 2},
]  # fmt: skip
SIZES = (4_600_000, 4_600_000, 4_590_000, 3_900_000, 7_400_000, 3_200_000)
RATIOS = (0.9973, 1.0106, 1.0029, 1.031, 1.0001, 1.21)
KLS = (0.021, 0.011, 0.004, 0.031, 0.0004, 0.19)


def linears(scale: float) -> tuple[LinearReport, ...]:
    return tuple(
        LinearReport(
            linear=name, bits=4, group_size=128, loss=scale * (index + 1), loss_rounding=2.0, energy=100
        )
        for index, name in enumerate(LINEARS)
    )


def candidate(index: int, recipe: Recipe) -> CandidateReport:
    kind = index % len(RATIOS)
    ratio, kl = RATIOS[kind], KLS[kind]
    spread = Interval(standard_error=0.003, low=ratio - 0.006, high=ratio + 0.006)
    return CandidateReport(
        recipe_index=index,
        label=recipe.label,
        recipe=recipe,
        bytes={"compressed-tensors": SIZES[kind]},
        bits_per_weight=4.25,
        perplexity=ORIGINAL_PERPLEXITY * ratio,
        perplexity_ratio=ratio,
        perplexity_ratio_interval=spread,
        beyond_noise=not spread.holds(1.0),
        kl=kl,
        top1_agreement=0.96,
        seconds={"searching": 2.5},
        layers=tuple(
            LayerReport(layer=layer, seconds=1, equivalence_error=0, linears=linears(1 + layer))
            for layer in range(LAYERS)
        ),
    )


def report_on(spec: JobSpec, *, windows: int) -> Report:
    text = {"dataset": "builtin:wikitext2", "windows": windows, "sequence_length": 128}
    candidates = tuple(candidate(index, recipe) for index, recipe in enumerate(spec.recipes))
    return Report(
        model=spec.model,
        model_digest="0" * 64,
        recipe_digests=("0" * 64,),
        calibration=text,
        evaluation=text,
        original=OriginalReport(perplexity=ORIGINAL_PERPLEXITY, bytes=ORIGINAL_BYTES),
        candidates=candidates,
        published=tuple(range(len(candidates))),
        histograms=(WeightHistogram(linear="a", low=-1, high=1, counts=(1, 2, 1), percentiles={}),),
        stages={"searching": 10.0},
        cpu_seconds={"searching": 19.0},
        prediction=Prediction(
            basis="measured",
            seconds={"searching": 12.0},
            candidate_seconds=(),
            ram_bytes=900_000_000,
            vram_bytes=0,
            disk_bytes=0,
            output_bytes=(),
        ),
        peak_rss_bytes=10**9,
        peak_vram_bytes=None,
        environment={"device": "cpu"},
    )


def finished(
    service: Service, store: JobStore, recipes: Sequence[Mapping[str, Any]] = RECIPES, *, windows: int = 16
) -> str:
    """A job that has ended with a report on these recipes; its id."""
    spec = JobSpec.model_validate({
        "model": "hf:ours/small", "recipe": [{"group_size": 128, **recipe} for recipe in recipes]
    })  # fmt: skip
    created = datetime.now(UTC) - timedelta(minutes=3)
    job = Job(id=new_id("job"), tenant="default", spec=spec, created_at=created, started_at=created)
    report = report_on(spec, windows=windows)
    settings = Settings(state_dir=Path(service.environment["NIBBLE_STATE_DIR"]))
    ObjectStore(settings.object_store_url).put(report_key(job.id), report.model_dump_json().encode())
    store.create(job)
    store.update(job.id, lambda job: transition(job, JobState.RUNNING))
    best = min(report.candidates, key=lambda each: each.kl or 0)
    figures = ResultFigures(
        label=best.label, bytes=best.bytes["compressed-tensors"], perplexity_ratio=best.perplexity_ratio,
        beyond_noise=best.beyond_noise, kl=best.kl,
    )  # fmt: skip
    store.update(job.id, lambda job: transition(job, JobState.SUCCEEDED, figures=figures))
    return job.id


def running(store: JobStore, layers: int = 2) -> str:
    """A job that runs, as far as its record and its events say."""
    spec = JobSpec.model_validate(
        {"model": "hf:ours/running", "recipe": {"method": "awq", "group_size": 128}}
    )
    job = Job(id=new_id("job"), tenant="default", spec=spec, created_at=datetime.now(UTC))
    store.create(job)
    store.claim(job.id, 1, worker="here-1", lease_s=600)
    for layer in range(layers):
        layer_done(store, job.id, layer)
    store.append_event(job.id, "note", {"code": "plan", "message": "down_proj keeps its precision"})
    return job.id


def layer_done(store: JobStore, job_id: str, layer: int) -> None:
    """The event of a finished layer and the progress after it."""
    solved = {"recipe_index": 0, "layer": layer, "error": 0.01 * (layer + 1), "error_of_rounding": 0.05}
    store.append_event(job_id, "checkpoint", {"key": f"layer-{layer}", "attempt": 1, **solved})
    use = ResourceUse(
        began_at=datetime.now(UTC) - timedelta(seconds=6), every_s=2,
        memory_bytes=(800_000_000, 1_400_000_000, 1_200_000_000), cpu_cores=(0.9, 1.8, 1.9),
        gpu_memory_bytes=(8 * 10**9,) * 3, gpu_share=(0.4, 0.9, 0.97),
    )  # fmt: skip
    progress = Progress(fraction=0.1 * (layer + 1), layer=layer + 1, layers=LAYERS, eta_s=60, use=use)
    store.update(job_id, lambda job: job.model_copy(update={"progress": progress}), attempt=1)


def forget(store: JobStore, job_id: str) -> None:
    """End a job that only seemed to run."""
    store.update(job_id, lambda job: transition(job, JobState.FAILED), attempt=1)
