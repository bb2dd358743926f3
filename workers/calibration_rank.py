"""A further device's share of a calibration pass: started by the job child, see workers/ranks.py."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

import torch

from app.core.assignment import Assignment
from workers.modeling.prefetch import WeightPrefetch, layer_reads
from workers.pipeline import Pipeline
from workers.ranks import joined


def run(assignment: Assignment, place: tuple[int, int, int], rendezvous: Path) -> None:
    """place: rank, number of ranks, and the layer before which the pass starts."""
    rank, size, layer = place
    pipeline = Pipeline(assignment, lambda message: None)
    calibration, _ = pipeline.read_texts()
    checkpoints = pipeline.open_checkpoints(calibration)
    with joined(rank, size, rendezvous, torch.device(assignment.device)) as ranks:
        part = pipeline.start_pass(calibration, checkpoints, layer, ranks)
        layers = range(layer, pipeline.plan.num_layers)
        reads = layer_reads(part.decoder, layers)
        with closing(WeightPrefetch(part.decoder.device, reads)) as weights:
            for _ in layers:
                part.collect(weights.take())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rank", "size", "layer"):
        parser.add_argument(name, type=int)
    parser.add_argument("rendezvous", type=Path)
    options = parser.parse_args()
    assignment = Assignment.model_validate_json(sys.stdin.read())
    if assignment.threads is not None:
        torch.set_num_threads(assignment.threads)
    run(assignment, (options.rank, options.size, options.layer), options.rendezvous)


if __name__ == "__main__":
    main()
