"""A further device's share of a calibration: started by the job child, see workers/child/ranks.py."""

from __future__ import annotations

import sys
from contextlib import closing

import torch

from app.core.telemetry.logs import log_warnings
from kernels.cpu.float_products import use_whole_vectors
from workers.child.quantized_chains import QuantizedChains
from workers.child.ranks import RankAssignment, joined, start_pass
from workers.child.stage_clock import StageClock
from workers.child.work import Work, read_texts
from workers.modeling.prefetch import WeightPrefetch, layer_reads


def run(rank: RankAssignment) -> None:
    work, shared = Work.open(rank.assignment), rank.shared
    clock = StageClock(lambda message: None, work.device, work.plan.steps)
    calibration = read_texts(work).calibration
    checkpoints = work.checkpoints(clock)
    with joined(rank.rank, rank.size, rank.rendezvous, work.device) as ranks:
        decoder = work.decoder()
        original = (
            start_pass(work, calibration, checkpoints, shared.start, ranks) if shared.calibrates else None
        )
        chains = QuantizedChains(shared.candidates, decoder, work.batches(calibration), ranks, clock)
        chains.catch_up(shared.start, checkpoints)
        if original is not None:
            chains.read_from(original)
        with closing(WeightPrefetch(decoder.device, layer_reads(decoder, shared.layers))) as prefetch:
            for _ in shared.layers:
                weights = prefetch.take()
                if original is not None:
                    original.collect(weights, moments=shared.moments)
                for candidate in shared.candidates:
                    chains.follow(candidate, weights)


def main() -> None:
    log_warnings()
    rank = RankAssignment.model_validate_json(sys.stdin.read())
    if rank.assignment.threads is not None:
        torch.set_num_threads(rank.assignment.threads)
    use_whole_vectors(torch.device(rank.assignment.device))
    run(rank)


if __name__ == "__main__":
    main()
