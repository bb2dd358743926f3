"""The quality report of a job: what was decided per linear, and what it cost and gained."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from app.core.formats.registry import FormatName
from app.core.formats.schemes import CacheName, SchemeName
from app.core.planning.cost_model import Prediction
from app.core.records.specs import Frozen, Recipe
from app.core.sources.model_headers import SourceFormat


class LinearReport(Frozen):
    """One linear. Losses are `tr(E H E^T)`: the expected squared error of its output, summed over rows."""

    linear: str
    bits: int | None  # None: kept in the model's precision
    group_size: int | None = None
    scheme: SchemeName | None = None  # None: kept, or an integer grid for weights alone
    reason: str | None = None  # why it was kept, has no scales or another group size
    ratio: float | None = None  # exponent of the activations; with weight_ratio 0, 0 is the identity
    weight_ratio: float | None = None  # exponent of the weights: 0, or 1 - ratio with duo scaling
    scale_spread: float | None = None  # s_max / s_min
    loss_rounding: float | None = None  # of plain rounding, without scales and clip
    loss_unclipped: float | None = None  # with scales
    loss_clipped: float | None = None  # with scales and clip, nearest integers
    loss: float | None = None  # as rounded
    energy: float | None = None  # mean square of the output itself, summed over rows, in the losses' unit
    weight_error: float | None = None  # without an evaluation: |q - w| / |w|, Frobenius, on every 64th row
    clip_gain: float | None = None  # 1 - loss_clipped / loss_unclipped
    clip_low: float | None = (
        None  # smallest weight that a group holds, median over groups, in the model's units
    )
    clip_high: float | None = None  # and the largest
    clip_floor: float | None = None  # smallest share of a range tried at first, by percentiles of the weights
    damping: float | None = None  # GPTQ: share of the mean diagonal added to H
    backend: str | None = None  # what computed the clip search: a kernel of ours, or torch


class LearningReport(Frozen):
    """OmniQuant's learning on one layer: mean squared differences of its output from the original's."""

    windows: int  # of calibration text, on the quantized chain, that it learned from
    judged_on: int = 0  # windows that the losses are of: others, or the same if the text had no more
    steps: int
    loss_start: float  # as the search and the rounding left it
    loss: float  # of the best epoch; never above the start


class ExpertTokens(Frozen):
    """How many calibration tokens the router sent to each of a layer's experts."""

    experts: int
    least: int
    median: float
    few: int  # experts that fewer than `needed` were sent to
    needed: int
    all_shown: bool = False  # each expert's statistics are of every token (`calibration.all_experts`)


class CacheScales(Frozen):
    """What a layer's keys and values are divided by before they are rounded; 448 times it was the largest."""

    key: float
    value: float


class CacheReport(Frozen):
    """The rounding of the cache in one candidate: the least and largest scales of its layers."""

    numbers: CacheName
    layers: int  # that have scales
    key_scales: tuple[float, float]
    value_scales: tuple[float, float]


class LayerReport(Frozen):
    """One decoder layer of one candidate."""

    layer: int
    seconds: float
    equivalence_error: float  # relative output error of the scaled, unrounded layer
    experts: ExpertTokens | None = None
    learning: LearningReport | None = None
    cache_scales: CacheScales | None = None  # None: its cache is as it was, or it has none
    linears: tuple[LinearReport, ...]


class Interval(Frozen):
    """The 95 % confidence interval of a mean over tokens.

    Tokens of one window are correlated, so the windows are the sample: with the means `m` of `n` windows the
    standard error is `sqrt(sum((m - mean(m))²) / (n (n - 1)))`, the clustered one for clusters of one size
    (Miller, Adding Error Bars to Evals, arXiv:2411.00640), and the interval is Student's with `n - 1`
    degrees of freedom.
    """

    standard_error: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


class TaskScore(Frozen):
    """One metric of a task, of the original and of the quantized model on the same documents.

    Standard errors are lm-eval's, but that of the difference, which is paired: document by document.
    """

    task: str
    metric: str
    documents: int
    original: float | None
    original_standard_error: float | None = None
    quantized: float | None
    quantized_standard_error: float | None = None
    difference_standard_error: float | None = None  # None where the metric is no mean over documents
    recovery: float | None = None  # quantized / original; the inverse where less is better
    recovery_interval: Interval | None = None


class TaskScores(Frozen):
    """The scores of a job's tasks, in order; a task's first metric is the one that counts."""

    recovery: float | None = None  # mean over the tasks; None where the original scores nothing
    recovery_interval: Interval | None = None
    scores: tuple[TaskScore, ...]


class Figures(Frozen):
    """A model beside the original, over all predicted tokens of the evaluation windows; None: not evaluated.

    An interval is None where there is one window, or a figure that is no number.
    """

    perplexity: float | None = None  # exp of the mean loss
    perplexity_ratio: float | None = None  # to the original's
    perplexity_ratio_interval: Interval | None = None  # exp of that of the mean difference of the losses
    beyond_noise: bool | None = None  # whether that interval leaves out 1
    kl: float | None = None  # mean KL(original || this) per token, nats; 0 for the original
    kl_interval: Interval | None = None
    kl_p99: float | None = None  # 99 % of the tokens have at most this KL
    top1_agreement: float | None = None  # share of tokens where the original's likeliest is this one's, too
    top1_agreement_interval: Interval | None = None
    tasks: TaskScores | None = None  # None: no tasks were named


class Quality(Figures):
    """The figures of a model that was evaluated."""

    perplexity: float
    perplexity_ratio: float
    kl: float


class CandidateReport(Figures):
    """One recipe: quality on the evaluation text, size, decisions."""

    recipe_index: int
    label: str
    recipe: Recipe
    inputs: str | None = None  # the chain whose outputs its layers were calibrated on; None: on none
    bytes: dict[FormatName, int]  # of the safetensors files
    bits_per_weight: float
    meets_target: bool | None = None  # None: no target was given
    verdict: str | None = None  # on the target, in words, with what the intervals say of it
    cache: CacheReport | None = None  # None: keys and values are not rounded
    gain_over_rounding: float | None = None  # share of plain rounding's relative output error that is gone
    seconds: dict[str, float]  # of this candidate alone: searching, packing, verifying
    layers: tuple[LayerReport, ...] = ()
    linears: tuple[LinearReport, ...] = ()  # of a job that is not evaluated, in place of layers


class TryReport(Quality):
    """One candidate on the way to the target."""

    rung: str
    reason: str  # the figures that led to it
    recipe_index: int
    label: str
    recipe: Recipe
    bytes: dict[FormatName, int]
    bits_per_weight: float
    seconds: float  # of this candidate alone
    meets_target: bool
    verdict: str | None = None


class WeightHistogram(Frozen):
    """Of one linear's original weights: equal bins between `low` and `high`."""

    linear: str
    low: float
    high: float
    counts: tuple[int, ...]
    percentiles: dict[str, float]


class OriginalReport(Frozen):
    perplexity: float | None = None  # None: not evaluated
    bytes: int


class Report(Frozen):
    """Everything that is known about the outcome of a job."""

    version: int = 1
    complete: bool = True  # a job that ended without a result has an UnfinishedReport
    model: str
    model_digest: str
    adapter: str | None = None  # merged into the weights: the original is the merged model
    adapter_digest: str | None = None
    source: SourceFormat | None = None  # the form in which the model came
    calibration_digest: str | None = None  # None: no text was read
    recipe_digests: tuple[str, ...]
    calibration: dict[str, Any] | None = None  # samples used and available, sequence length, chain
    evaluation: dict[str, Any] | None = None  # None: the job was not evaluated
    original: OriginalReport
    candidates: tuple[CandidateReport, ...]
    published: tuple[int, ...] = ()  # recipe_index of each candidate that is an artifact
    tries: tuple[TryReport, ...] = ()  # with a target: every candidate, in order
    histograms: tuple[WeightHistogram, ...] = ()
    prediction: Prediction | None = None  # made before the run, of the recipes as asked
    stages: dict[str, float] = Field(description="wall seconds per stage")
    cpu_seconds: dict[str, float] = Field(
        default={}, description="processor seconds per stage, of all threads"
    )
    resumed_at_layer: int = 0
    peak_rss_bytes: int
    peak_vram_bytes: int | None
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()
