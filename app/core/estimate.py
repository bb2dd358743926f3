"""What a job will take, from its plan alone: time, memory, disk. No device is asked."""

from __future__ import annotations

from typing import Literal

from app.core.plan import CandidatePlan, Plan
from app.core.specs import FormatName, Frozen
from app.core.submission import CheckedSubmission

DeviceKind = Literal["cpu", "cuda"]

# Sustained operations per second of a forward pass: a small host, a data centre GPU. Assumptions.
OPERATIONS_PER_S: dict[DeviceKind, float] = {"cpu": 80e9, "cuda": 100e12}
# Search and packing beside the calibration's forward pass.
SEARCH_SHARE = 0.5
BASE_RAM_BYTES = 700_000_000  # interpreter, torch, tokenizer
BASE_VRAM_BYTES = 600_000_000  # the CUDA context
BATCH_WINDOWS = 8


class LinearEstimate(Frozen):
    """One linear: its width, or the reason why it keeps its precision."""

    name: str
    out_features: int
    in_features: int
    bits: int | None
    group_size: int | None
    reason: str | None


class CandidateEstimate(Frozen):
    """One recipe: what is done to each linear, and the size of each format."""

    recipe_index: int
    label: str
    bits_per_weight: float
    output_bytes: dict[FormatName, int]
    linears: tuple[LinearEstimate, ...]


class Estimate(Frozen):
    """The figures of a job. Times are rough; sizes of outputs are exact but for their metadata."""

    object: Literal["estimate"] = "estimate"
    model: str
    architecture: str
    parameters: int
    layers: int
    device: DeviceKind
    time_s: float
    ram_bytes: int
    vram_bytes: int
    disk_bytes: int
    download_bytes: int
    output_bytes: int
    notes: tuple[str, ...]
    candidates: tuple[CandidateEstimate, ...]


def estimate(checked: CheckedSubmission, device: DeviceKind) -> Estimate:
    plan, spec = checked.plan, checked.spec
    output = sum(size for candidate in plan.candidates for size in candidate.output_bytes.values())
    working = working_bytes(plan, spec.calibration.num_samples, spec.calibration.sequence_length)
    return Estimate(
        model=spec.model,
        architecture=plan.architecture.model_type,
        parameters=plan.parameters,
        layers=plan.num_layers,
        device=device,
        time_s=round(seconds(checked, device), 1),
        ram_bytes=BASE_RAM_BYTES + working,
        vram_bytes=BASE_VRAM_BYTES + working if device == "cuda" else 0,
        disk_bytes=checked.download_bytes + 2 * output,  # outputs lie in the work folder and in storage
        download_bytes=checked.download_bytes,
        output_bytes=output,
        notes=plan.notes,
        candidates=tuple(candidate_estimate(candidate) for candidate in plan.candidates),
    )


def seconds(checked: CheckedSubmission, device: DeviceKind) -> float:
    """Two operations per parameter and token: one calibration pass, and evaluations of all candidates."""
    plan, spec = checked.plan, checked.spec
    length = spec.calibration.sequence_length
    calibration = spec.calibration.num_samples * length * (1 + SEARCH_SHARE * len(plan.candidates))
    evaluation = spec.evaluation.num_samples * length * (1 + len(plan.candidates))
    return 2 * plan.parameters * (calibration + evaluation) / OPERATIONS_PER_S[device]


def working_bytes(plan: Plan, samples: int, length: int) -> int:
    """One layer in fp32 with a copy, its second moments, all hidden states, logits of one batch."""
    widths = {linear.in_features for candidate in plan.candidates for linear in candidate.linears}
    layer = 2 * 4 * layer_parameters(plan)
    moments = 4 * sum(width * width for width in widths)
    hidden = 2 * 4 * samples * length * plan.hidden_size
    logits = 2 * 4 * min(samples, BATCH_WINDOWS) * length * plan.vocab_size
    return layer + moments + hidden + logits


def layer_parameters(plan: Plan) -> int:
    return plan.layer_bytes // (4 if plan.dtype == "float32" else 2)


def candidate_estimate(candidate: CandidatePlan) -> CandidateEstimate:
    return CandidateEstimate(
        recipe_index=candidate.recipe_index,
        label=candidate.label,
        bits_per_weight=candidate.bits_per_weight,
        output_bytes=candidate.output_bytes,
        linears=tuple(
            LinearEstimate(
                name=linear.name,
                out_features=linear.out_features,
                in_features=linear.in_features,
                bits=linear.scheme.bits if linear.scheme is not None else None,
                group_size=linear.scheme.group_size if linear.scheme is not None else None,
                reason=linear.reason,
            )
            for linear in candidate.linears
        ),
    )
