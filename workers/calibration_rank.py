"""A further device's share of a calibration pass: started by the job child, see workers/ranks.py."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

import torch

from app.core.assignment import Assignment
from workers.modeling.prefetch import WeightPrefetch
from workers.pipeline import Pipeline
from workers.ranks import joined


def run(assignment: Assignment, place: tuple[int, int, int], rendezvous: Path) -> None:
    """place: rank, number of ranks, and the layer before which the pass starts."""
    rank, size, layer = place
    pipeline = Pipeline(assignment, lambda message: None)
    calibration, _ = pipeline.read_texts()
    checkpoints = pipeline.open_checkpoints(calibration)
    last = pipeline.plan.num_layers - 1
    with joined(rank, size, rendezvous, torch.device(assignment.device)) as ranks:
        part = pipeline.start_pass(calibration, checkpoints, layer, ranks)
        with closing(WeightPrefetch(part.decoder, last)) as weights:
            for index in range(layer, last + 1):
                part.collect(weights.layer_weights(index))


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
