"""Layer after layer: calibrate it once, solve it for every recipe, write what was solved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from app.core.jobs.report import WeightHistogram
from app.core.records.job import Stage
from workers.child.candidate_files import CandidateFiles
from workers.child.layer_files import StatisticsStore, resume_layer
from workers.child.layer_solver import CalibratedLayer, LayerSolver, expert_tokens
from workers.child.layer_writer import LayerWriter
from workers.child.quantized_chains import QuantizedChains
from workers.child.ranks import SharedLayers, start_pass, started
from workers.child.stage_clock import StageClock
from workers.child.work import Work
from workers.modeling.layer_weights import Weights
from workers.modeling.prefetch import WeightPrefetch, layer_reads
from workers.quantization.calibration import CalibrationPass
from workers.quantization.histograms import weight_histogram
from workers.texts.windows import Windows

STATES_INTERVAL_S = 20.0  # hidden states are large: losing up to this much forward time costs less


@dataclass(frozen=True)
class SolvedLayers:
    """The report's facts on the layers that their checkpoints do not hold."""

    resumed_at: int  # the first layer that an earlier attempt had not finished
    histograms: list[WeightHistogram]


def solve_layers(
    work: Work,
    calibration: Windows,
    files: Sequence[CandidateFiles],
    statistics: StatisticsStore | None,
    clock: StageClock,
) -> SolvedLayers:
    """Calibrate and solve every layer that is not finished, for all candidates, which share checkpoints."""
    steps, checkpoints = work.plan.steps, files[0].checkpoints
    resumed_at = resume_layer(checkpoints, steps, len(files))
    histograms: list[WeightHistogram] = []
    if resumed_at:
        clock.note("resumed", f"{resumed_at} of {steps} layers were finished before")
        histograms = finished_histograms(work, resumed_at, clock)
    if resumed_at == steps:
        return SolvedLayers(resumed_at, histograms)
    shared = SharedLayers.of(
        range(resumed_at, steps), [each.candidate for each in files], moments=statistics is not None
    )
    with started(work, calibration, shared, clock) as ranks, LayerWriter(work.device) as writer:
        with clock.stage(Stage.CALIBRATING):
            run = start_pass(work, calibration, checkpoints, resumed_at, ranks)
        chains = QuantizedChains(
            shared.candidates, run.decoder, work.batches(calibration), ranks, clock
        )  # fmt: skip
        chains.catch_up(resumed_at, checkpoints)
        chains.read_from(run)
        solver = LayerSolver(work, run, chains, writer, clock)
        saved = time.monotonic()  # when the hidden states were
        with closing(WeightPrefetch(work.device, layer_reads(run.decoder, shared.layers))) as weights:
            for layer in shared.layers:
                calibrated = calibrate_layer(work, run, weights, clock, moments=shared.moments)
                histograms += layer_histograms(work, layer, calibrated.weights)
                if statistics is not None:
                    statistics.save(layer, calibrated.statistics)
                for one in files:
                    solver.solve(one, calibrated)
                # Of several ranks none has all states.
                late = time.monotonic() - saved > STATES_INTERVAL_S
                if late and ranks.size == 1 and run.can_restore and run.layer < steps:
                    writer.put(partial(checkpoints.save_states, run.layer, list(run.states)))
                    saved = time.monotonic()
                clock.progress(0.6 * (layer + 1) / steps, layer + 1)
        with clock.counted(Stage.PACKING):
            writer.finish()
    return SolvedLayers(resumed_at, histograms)


def calibrate_layer(
    work: Work, run: CalibrationPass, prefetch: WeightPrefetch, clock: StageClock, *, moments: bool
) -> CalibratedLayer:
    """The next layer of the pass with its statistics; `moments`: see `CalibrationPass.collect`."""
    layer = run.layer
    with clock.stage(Stage.CALIBRATING):
        weights = prefetch.take()
        statistics = run.collect(weights, moments=moments)
    seen = expert_tokens(statistics, work.plan.architecture.at(layer))
    if seen is not None and seen.few and not seen.all_shown:
        clock.note(
            "few_tokens",
            f"layer {layer}: {seen.few} of {seen.experts} experts saw fewer than {seen.needed} calibration "
            f"tokens (least {seen.least}, median {seen.median:g}); more of them, or "
            "`calibration.all_experts`, give each its own scales",
        )
    return CalibratedLayer(layer, work.full_precision(weights), statistics)


def layer_histograms(work: Work, layer: int, weights: Weights) -> list[WeightHistogram]:
    """Of the linears of a layer with these float32 weights."""
    prefix = work.plan.architecture.layer_prefix(layer)
    return [
        weight_histogram(prefix + name, weights[name + ".weight"])
        for name in work.plan.architecture.at(layer).linears
    ]


def finished_histograms(work: Work, resumed_at: int, clock: StageClock) -> list[WeightHistogram]:
    """Those of the layers that an earlier attempt finished."""
    histograms: list[WeightHistogram] = []
    reads = layer_reads(work.decoder(), range(resumed_at))
    with clock.stage(Stage.CALIBRATING), closing(WeightPrefetch(work.device, reads)) as weights:
        for layer in range(resumed_at):
            histograms += layer_histograms(work, layer, work.full_precision(weights.take()))
    return histograms
