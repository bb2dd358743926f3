"""How fast a model is served beside its 16-bit original: estimated from bytes and rates, or as published.

A step for `batch` sequences reads every weight once and multiplies it `batch` times. So a weight takes the
longer of its bytes over the bandwidth and 2 x batch operations over the rate of the numbers that are
multiplied (the roofline model: Williams, Waterman and Patterson 2009). It is of linears alone: attention,
the cache and everything around them make ratios smaller, and converting weights while they are multiplied
costs time that it does not know. Where that was measured, the published figures stand in its place, those
of integers for weights alone also for other numbers of as many bits that are read as weights alone.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import computed_field

from app.core.formats.file_format import Scheme
from app.core.formats.schemes import SCHEMES
from app.core.planning.server_kernels import Use, row_of
from app.core.planning.serving_devices import Multiplied, ServingDevice
from app.core.records.specs import Frozen

BATCHES = (1, 16, 64)  # sequences at a time that advice is about
ORIGINAL_BITS = 16
FASTER, SLOWER = 1.1, 0.9  # ratios that are told apart from 1
# Up to which kernels convert weights while they wait for them: ~4x to 16-32 sequences, falling to 64-128
# (Marlin, PPoPP 2025). Beyond, what is estimated for weights alone is a bound.
HIDDEN_CONVERSION = 32
ESTIMATED = "estimated from bytes and rates, not measured"
MX_INPUTS: Multiplied = "fp4"  # of a server that rounds the inputs of mxfp4a16 nevertheless

Verdict = Literal["faster", "as fast", "slower", "depends on the kernel"]


class Published(NamedTuple):
    """Ratios to 16 bits that somebody measured: of several kernels or models the lowest and highest."""

    rows: tuple[str, ...]
    capability: float
    ratios: dict[int, tuple[float, float]]  # by sequences at a time
    source: str


TRT = "TensorRT-LLM, 8B on an H200"  # at 1, 8 and 64 (Model-Optimizer, examples/benchmark.md)
HUMMING = "Marlin and Humming, one product on an H200"  # 8192 x 8192 (humming, benchmarks/results/h200)
MARLIN = "Marlin, one product on an A10"  # 72k x 18k (its README, peak.png)
GPT_FAST = "gpt-fast, Llama-2-7B on an A100"  # 104.9 tokens/s in bf16, 155.6 in int8, 196.8 in int4 (README)
MARLIN_7B = f"{GPT_FAST}; Marlin, 7B on an A100"  # models.png, and ~3.8 for products up to 16 to 32
# No W4A16 of these, nor any other that was seen published, is faster than FP8 at 64 and more on 9.0.
PUBLISHED = (
    Published(("fp8", "fp8-static"), 9.0, {1: (1.41, 1.41), 16: (1.31, 1.31), 64: (1.30, 1.30)}, TRT),
    Published(("w4a16",), 9.0, {1: (1.33, 2.24), 16: (0.75, 2.20), 64: (0.83, 1.61)}, f"{TRT}; {HUMMING}"),
    Published(("w8a16",), 9.0, {1: (1.60, 1.61), 16: (1.60, 1.60), 64: (0.93, 1.33)}, HUMMING),
    Published(("w3a16",), 9.0, {1: (2.26, 2.26), 16: (2.20, 2.20), 64: (1.55, 1.55)}, HUMMING),
    Published(("w4a16",), 8.0, {1: (1.88, 3.8), 16: (2.2, 3.8)}, MARLIN_7B),
    Published(("w8a16",), 8.0, {1: (1.48, 1.48)}, GPT_FAST),
    Published(("w4a16",), 8.6, {1: (3.87, 3.87), 16: (3.87, 3.87), 64: (3.1, 3.1)}, MARLIN),
)


class Speed(Frozen):
    """Steps per second as a multiple of the original's; one figure alone is both `low` and `high`."""

    sequences: int
    low: float
    high: float
    basis: str  # the source, or that it is an estimate
    at_most: bool = False  # a bound that kernels are not known to reach

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorator above a property
    @property
    def verdict(self) -> Verdict:
        if self.at_most and self.high > SLOWER:
            return "depends on the kernel"
        if self.low >= FASTER:
            return "faster"
        if self.high <= SLOWER:
            return "slower"
        return "as fast" if self.low > SLOWER and self.high < FASTER else "depends on the kernel"

    @property
    def ratio_text(self) -> str:
        low, high = f"{self.low:.1f}", f"{self.high:.1f}"
        if low == high:
            return f"at most {high}" if self.at_most else high
        return f"{low} to {high}"


def speed_of(
    scheme: Scheme, bits_per_weight: float, use: Use, device: ServingDevice, sequences: int
) -> Speed | None:
    """Beside 16 bits with so many sequences at a time; None where nothing can be said."""
    if device.bandwidth is None or use not in ("numbers", "weights"):
        return None
    published = published_ratios(scheme, use, device, sequences)
    if published is not None:
        return published
    original = weight_seconds(ORIGINAL_BITS, "16 bits", device, sequences)
    own = weight_seconds(bits_per_weight, multiplied(scheme, use), device, sequences)
    if original is None or own is None:
        return None
    ratio = round(original / own, 2)
    at_most = use == "weights" and sequences > HIDDEN_CONVERSION
    return Speed(sequences=sequences, low=ratio, high=ratio, basis=ESTIMATED, at_most=at_most)


def published_ratios(scheme: Scheme, use: Use, device: ServingDevice, sequences: int) -> Speed | None:
    """The published figures for the number of sequences that is nearest below; none beyond the largest."""
    row = row_of(scheme) if use == "numbers" else f"w{scheme.bits}a16"
    for one in PUBLISHED:
        if row not in one.rows or device.capability != one.capability:
            continue
        largest = max(one.ratios)
        counts = [count for count in one.ratios if count <= sequences]
        if counts and (sequences <= largest or largest == BATCHES[-1]):
            low, high = one.ratios[max(counts)]
            return Speed(sequences=sequences, low=low, high=high, basis=f"published: {one.source}")
    return None


def weight_seconds(bits: float, numbers: Multiplied, device: ServingDevice, sequences: int) -> float | None:
    """Seconds per weight and step; None where the device does not multiply such numbers."""
    rate = device.rates.get(numbers)
    if rate is None or device.bandwidth is None:
        return None
    return max(bits / 8 / device.bandwidth, 2 * sequences / rate)


def multiplied(scheme: Scheme, use: Use) -> Multiplied:
    """The numbers that products are computed from."""
    if use != "numbers":
        return "16 bits"
    inputs = SCHEMES[scheme.name].inputs
    if inputs is None:
        return MX_INPUTS if scheme.name == "mxfp4a16" else "16 bits"
    if inputs.bits == 4:
        return "fp4"
    return "int8" if inputs.numbers == "int" else "fp8"
