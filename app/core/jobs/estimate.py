"""The estimate of a job for callers: the cost model's figures and the plan's decisions."""

from __future__ import annotations

from typing import Literal

from app.core.formats.registry import FormatName
from app.core.formats.schemes import SchemeName
from app.core.jobs.submission import CheckedSubmission
from app.core.planning.cost_model import NETWORK, Step, answers_bytes, predict
from app.core.planning.device_profile import NOMINAL, Basis, DeviceKind, DeviceProfile, rates_notes
from app.core.planning.large_layers import layers_by_expert
from app.core.planning.model_free import StreamedPlan
from app.core.planning.plan import CandidatePlan, Plan
from app.core.records.specs import BUNDLED_TASKS, Frozen, JobSpec


class LinearEstimate(Frozen):
    """One linear: its width, or the reason why it keeps its precision."""

    name: str
    out_features: int
    in_features: int
    bits: int | None
    group_size: int | None
    scheme: SchemeName | None = None  # None: kept, or an integer grid for weights alone
    reason: str | None


class CandidateEstimate(Frozen):
    """One recipe: what is done to each linear, and the size of each format."""

    recipe_index: int
    label: str
    bits_per_weight: float
    time_s: float  # of this recipe alone: its share of the stages
    output_bytes: dict[FormatName, int]
    linears: tuple[LinearEstimate, ...]


class Estimate(Frozen):
    """The figures of a job. Times are rough; sizes of outputs are exact but for their metadata.

    `time_s` is the sum of `stages`, and also the sum of `shared_s` and the times of the candidates.
    """

    object: Literal["estimate"] = "estimate"
    model: str
    architecture: str
    parameters: int
    layers: int
    device: DeviceKind
    basis: Basis  # of the rates of the best living worker's device
    time_s: float
    stages: dict[Step, float]
    shared_s: (
        float  # what all candidates have in common: start, fetching, calibration, the original's figures
    )
    ram_bytes: int
    vram_bytes: int
    disk_bytes: int
    download_bytes: int
    output_bytes: int
    notes: tuple[str, ...]
    candidates: tuple[CandidateEstimate, ...]


def estimate(
    checked: CheckedSubmission, device: DeviceKind, profile: DeviceProfile | None = None
) -> Estimate:
    """On a device of this kind, with the rates of `profile` if one was measured."""
    plan, spec = checked.plan, checked.spec
    profile = profile or NOMINAL[device]
    prediction = predict(plan, spec, profile, download_bytes=checked.download_bytes)
    output = sum(prediction.output_bytes)
    stages = {step: rounded(spent) for step, spent in prediction.seconds.items()}
    candidates = tuple(
        candidate_estimate(candidate, sum(own.values()))
        for candidate, own in zip(plan.candidates, prediction.candidate_seconds, strict=True)
    )
    time_s = rounded(sum(stages.values()))
    return Estimate(
        model=spec.model,
        architecture=plan.model_type,
        parameters=plan.parameters,
        layers=plan.num_layers,
        device=device,
        basis=prediction.basis,
        time_s=time_s,
        stages=stages,
        shared_s=rounded(time_s - sum(candidate.time_s for candidate in candidates)),
        ram_bytes=prediction.ram_bytes,
        vram_bytes=prediction.vram_bytes,
        # Outputs lie in the work folder and in storage.
        disk_bytes=checked.download_bytes + prediction.disk_bytes + output,
        download_bytes=checked.download_bytes,
        output_bytes=output,
        notes=(
            *rates_notes(profile),
            *download_notes(checked.download_bytes),
            *task_notes(spec),
            *answer_notes(spec, plan, device),
            *expert_notes(plan, device),
            *plan.notes,
        ),
        candidates=candidates,
    )


def rounded(seconds: float) -> float:
    """To what is shown, so that what is shown adds up."""
    return round(seconds, 1)


def task_notes(spec: JobSpec) -> tuple[str, ...]:
    unknown = ", ".join(name for name in spec.tasks if name not in BUNDLED_TASKS)
    note = f"the time of {unknown} is not included: how many documents there are is not known"
    return (note,) if unknown else ()


def answer_notes(spec: JobSpec, plan: Plan | StreamedPlan, device: DeviceKind) -> tuple[str, ...]:
    if not spec.calibration.is_own_answers or isinstance(plan, StreamedPlan):
        return ()
    tokens = spec.calibration.num_samples * spec.calibration.sequence_length
    size = answers_bytes(plan, spec, device) / 1e9
    return (
        f"the model writes its calibration text itself, {tokens} tokens, and is held whole meanwhile: "
        f"{size:.1f} GB, where a job with other text needs little more than a layer",
    )


def expert_notes(plan: Plan | StreamedPlan, device: DeviceKind) -> tuple[str, ...]:
    """What is done about layers whose experts are too many to be held, or is not."""
    apart = frozenset[int]() if isinstance(plan, StreamedPlan) else layers_by_expert(plan, device)
    if not apart:
        return ()
    if any(candidate.recipe.method == "omniquant" for candidate in plan.candidates):
        return ("omniquant learns from whole layers: all experts of one are held, in several copies",)
    return (
        f"{len(apart)} of {plan.num_layers} layers are quantized expert by expert: their weights are read "
        "again for each batch of text, and memory does not grow with the number of experts",
    )


def download_notes(size: int) -> tuple[str, ...]:
    if size == 0:
        return ()
    return (f"fetching assumes {NETWORK / 1e6:.0f} MB/s, and that the worker does not have the model yet",)


def candidate_estimate(candidate: CandidatePlan, time_s: float) -> CandidateEstimate:
    return CandidateEstimate(
        recipe_index=candidate.recipe_index,
        label=candidate.label,
        bits_per_weight=candidate.bits_per_weight,
        time_s=rounded(time_s),
        output_bytes=candidate.output_bytes,
        linears=tuple(
            LinearEstimate(
                name=linear.name,
                out_features=linear.out_features,
                in_features=linear.in_features,
                bits=linear.scheme.bits if linear.scheme is not None else None,
                group_size=linear.scheme.group_size if linear.scheme is not None else None,
                scheme=None if linear.scheme is None or linear.scheme.is_plain else linear.scheme.name,
                reason=linear.reason,
            )
            for linear in candidate.linears
        ),
    )
