"""What the search costs beside the bare forward pass, on a CPU, part by part; and the peak of memory.

    python tests/benchmarks/search_cost.py                                      the bundled model, 128 x 512
    python tests/benchmarks/search_cost.py --shape tinyllama-1.1b --samples 16  random weights of that shape

One recipe: AWQ with clip, W4 g128. The bare pass runs the same batches through the same layers and keeps
nothing; statistics are what calibrating takes beyond it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from random_model import SHAPES, write_model  # noqa: E402

from app.core.child.assignment import Assignment  # noqa: E402
from workers.child.candidate_files import CandidateFiles  # noqa: E402
from workers.child.layer_loop import calibrate_layer  # noqa: E402
from workers.child.layer_solver import LayerSolver  # noqa: E402
from workers.child.layer_writer import LayerWriter  # noqa: E402
from workers.child.quantized_chains import QuantizedChains  # noqa: E402
from workers.child.stage_clock import StageClock  # noqa: E402
from workers.child.work import Work, read_texts  # noqa: E402
from workers.devices.torch_process import return_freed_memory  # noqa: E402
from workers.modeling.prefetch import WeightPrefetch, layer_reads  # noqa: E402
from workers.quantization import layer, rounding  # noqa: E402
from workers.quantization.calibration import CalibrationPass  # noqa: E402
from workers.quantization.reduction import ALONE  # noqa: E402

MODEL = REPOSITORY / "examples" / "wikitext-llama-6m"


class Clock:
    """CPU seconds of the process by name: other work on the machine does not count."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] += time.process_time() - started

    def watch(self, module: ModuleType, function: str, name: str) -> None:
        """Count the calls that `module` makes of a function."""
        original: Callable[..., Any] = getattr(module, function)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.counted(name):
                return original(*arguments, **named)

        setattr(module, function, timed)


def measure(model: Path, samples: int, work: Path) -> dict[str, float]:
    """Seconds of each part of a job, and of the bare pass."""
    return_freed_memory()  # as the job child does
    spec = {"model": "file:///benchmark", "calibration": {"num_samples": samples}}
    job = Work.open(
        Assignment.model_validate(
            {
                "spec": spec, "model_folder": model, "model_name": model.name, "model_digest": "0" * 64,
                "calibration_digest": "0" * 64, "work_folder": work,
            }
        )
    )  # fmt: skip
    stages = StageClock(lambda message: None, job.device, job.plan.num_layers)
    batches = job.batches(read_texts(job).calibration)
    files = CandidateFiles.of(job, job.plan.candidates[0], job.checkpoints(stages))
    clock = Clock()
    clock.watch(layer, "search_scales", "scale search")
    clock.watch(rounding, "search_clip", "clip search")
    bare, run = (CalibrationPass(job.decoder(), batches) for _ in range(2))
    weights = WeightPrefetch(job.device, layer_reads(run.decoder, range(job.plan.num_layers)))
    chains = QuantizedChains((files.candidate,), run.decoder, batches, ALONE, stages)
    with LayerWriter(job.device) as writer:
        solver = LayerSolver(job, run, chains, writer, stages)
        for index in range(job.plan.num_layers):
            loaded = bare.decoder.layer_weights(index)
            with clock.counted("bare forward pass"):
                bare.pass_through(loaded)
            del loaded  # the job itself reads no layer twice
            with clock.counted("calibrating"):
                calibrated = calibrate_layer(job, run, weights, stages)
            with clock.counted("searching"):
                solver.solve(files, calibrated)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            parts = {name: round(value, 1) for name, value in clock.seconds.items()}
            print(index, parts, f"{peak:.2f} GiB", flush=True)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL
        if options.shape is not None:
            model = Path(folder) / "random"
            torch.manual_seed(0)
            write_model(model, options.shape, options.layers)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (Path(folder) / "work").mkdir()
        seconds = measure(model, options.samples, Path(folder) / "work")
    seconds["statistics"] = seconds.pop("calibrating") - seconds["bare forward pass"]
    seconds["rounding, reports, checks"] = (
        seconds["searching"] - seconds["scale search"] - seconds["clip search"]
    )
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {value:.2f} s | {value / seconds['bare forward pass']:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident {peak / 2**20:.2f} GiB (before the job {before / 2**20:.2f})")


if __name__ == "__main__":
    main()
