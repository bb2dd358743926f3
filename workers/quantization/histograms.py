"""The distribution of a linear's original weights, for plots and to bound the clip search."""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.report import WeightHistogram

BINS = 48
PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
SAMPLE = 1_000_000  # weights that percentiles are taken from; quantile() is limited to 16 million


def weight_histogram(name: str, weight: Tensor) -> WeightHistogram:
    """weight: (out_features, in_features), float32."""
    flat = weight.flatten()
    low, high = float(flat.min()), float(flat.max())
    width = max(high - low, 1e-30)
    bins = ((flat - low) * (BINS / width)).to(torch.int64).clamp_(0, BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    sample = flat[:: max(1, flat.numel() // SAMPLE)]
    levels = torch.quantile(sample, torch.tensor(PERCENTILES, device=sample.device) / 100)
    return WeightHistogram(
        linear=name,
        low=low,
        high=high,
        counts=tuple(counts.tolist()),
        percentiles={f"p{p:g}": value for p, value in zip(PERCENTILES, levels.tolist(), strict=True)},
    )
