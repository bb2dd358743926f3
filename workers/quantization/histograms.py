"""The distribution of a linear's original weights, for plots."""

from __future__ import annotations

import torch
from torch import Tensor

from app.core.jobs.report import WeightHistogram

BINS = 48
PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
AT_ONCE = 2**24  # float32 counts to this
SAMPLE = 2**16  # weights that percentiles are taken from: sorting them takes 4 ms


def weight_histogram(name: str, weight: Tensor) -> WeightHistogram:
    """weight: (out_features, in_features), float32."""
    flat = weight.flatten()
    low, high = (float(bound) for bound in flat.aminmax())
    counts = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
    for chunk in torch.split(flat, AT_ONCE):
        counts += torch.histc(chunk, BINS, low, high).to(torch.int64)
    sample = flat[:: max(1, flat.numel() // SAMPLE)]
    levels = torch.quantile(sample, torch.tensor(PERCENTILES, device=sample.device) / 100)
    return WeightHistogram(
        linear=name,
        low=low,
        high=high,
        counts=tuple(counts.tolist()),
        percentiles={f"p{p:g}": value for p, value in zip(PERCENTILES, levels.tolist(), strict=True)},
    )
