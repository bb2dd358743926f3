"""The report's parts that are put together from what the engine returned."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from app.core.formats.registry import FormatName
from app.core.jobs.report import CandidateReport, LayerReport
from app.core.planning.plan import CandidatePlan
from app.core.records.specs import TargetSpec, TextSpec
from kernels.search.search_operators import search_backend
from workers.child.account import Account
from workers.formats.folder import FormatFolder
from workers.quantization.evaluation import Quality
from workers.texts.windows import Windows


@dataclass(frozen=True)
class Outcome:
    """A candidate that was packed, read back and measured."""

    candidate: CandidatePlan
    quality: Quality
    folders: list[FormatFolder]
    bytes: dict[FormatName, int]
    layers: list[LayerReport]


def candidate_report(
    outcome: Outcome, original: Quality, target: TargetSpec | None, account: Account
) -> CandidateReport:
    candidate, quality = outcome.candidate, outcome.quality
    ratio = quality.perplexity / original.perplexity
    return CandidateReport(
        recipe_index=candidate.recipe_index,
        label=candidate.label,
        inputs=candidate.recipe.inputs,
        recipe=candidate.recipe,
        perplexity=quality.perplexity,
        perplexity_ratio=ratio,
        kl=quality.kl,
        bytes=outcome.bytes,
        bits_per_weight=candidate.bits_per_weight,
        meets_target=None if target is None else target.excess(ratio, quality.kl) <= 1,
        gain_over_rounding=gain_over_rounding(outcome.layers),
        seconds=dict(account.candidate_seconds[candidate.recipe_index]),
        layers=tuple(outcome.layers),
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
    """What was read of a text, as the report names it."""
    return {
        "dataset": spec.source,
        "windows": windows.tokens.shape[0],
        "windows_available": windows.available,
        "sequence_length": windows.tokens.shape[1],
        "digest": windows.digest,
    }


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_vram_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def environment(device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "nibble": version("nibble"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "search_backend": search_backend(device),
    }
