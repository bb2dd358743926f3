"""A further device's share of a calibration: started by the job child, see workers/child/ranks.py."""

from __future__ import annotations

import sys
from contextlib import closing

import torch

from app.core.telemetry.logs import log_warnings
from workers.child.pipeline import Pipeline
from workers.child.ranks import RankAssignment, joined
from workers.modeling.prefetch import WeightPrefetch, layer_reads


def run(part: RankAssignment) -> None:
    assignment, work = part.assignment, part.work
    pipeline = Pipeline(assignment, lambda message: None)
    calibration, _ = pipeline.read_texts()
    checkpoints = pipeline.open_checkpoints(calibration)
    with joined(part.rank, part.size, part.rendezvous, torch.device(assignment.device)) as ranks:
        decoder = pipeline.decoder()
        original = (
            pipeline.start_pass(calibration, checkpoints, work.start, ranks) if work.calibrates else None
        )
        chains = pipeline.start_chains(work.candidates, decoder, calibration, ranks)
        chains.catch_up(work.start, checkpoints)
        layers = range(work.start, work.stop)
        with closing(WeightPrefetch(decoder.device, layer_reads(decoder, layers))) as prefetch:
            for _ in layers:
                weights = prefetch.take()
                if original is not None:
                    original.collect(weights)
                for candidate in work.candidates:
                    chains.follow(candidate, weights)


def main() -> None:
    log_warnings()
    part = RankAssignment.model_validate_json(sys.stdin.read())
    if part.assignment.threads is not None:
        torch.set_num_threads(part.assignment.threads)
    run(part)


if __name__ == "__main__":
    main()
