"""Model-free FP8 beside a copy of the same files: random weights of an 8B model's shapes, with fewer layers.

    python -m tests.benchmarks.model_free --folder /scratch --layers 7 --rounds 3

Both sides start with a cold cache of the source, and end when what they wrote is on the disk. The job's side
is its whole process, from its start to its report. Sides take turns; medians are printed, and every run, with
the seconds of processors that each took: those hardly change when other work shares the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app.core.child.assignment import Assignment
from app.core.records.specs import JobSpec
from workers.formats.shards import ShardWriter, TensorPlan

HIDDEN, INTERMEDIATE, KEYS, VOCABULARY = 4096, 14336, 1024, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}  # fmt: skip
COPIED = 1 << 24


def make_model(folder: Path, layers: int) -> None:
    """Write the checkpoint, of a type that no definition is known of."""
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    plans = [TensorPlan(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    writer = ShardWriter(folder, plans, 2**31)
    draws = torch.Generator().manual_seed(0)
    stock = torch.randn(INTERMEDIATE * HIDDEN, generator=draws).mul_(0.02).to(torch.bfloat16)
    for plan in plans:
        count = plan.size // 2
        rest, whole = count % len(stock), count // len(stock)
        writer.write(plan.name, torch.cat([*[stock] * whole, stock[:rest]]).view(plan.shape))
    writer.close()
    config = {"model_type": "no_definition", "architectures": ["None"], "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_out(folder: Path) -> None:
    """Wait until the files are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


class Spent(NamedTuple):
    """Seconds of a clock, and of processors."""

    wall: float
    processors: float

    @classmethod
    def now(cls) -> Spent:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.monotonic(), used.ru_utime + used.ru_stime)

    @property
    def since(self) -> Spent:
        now = self.now()
        return Spent(now.wall - self.wall, now.processors - self.processors)


def timed_copy(model: Path, target: Path) -> Spent:
    """Of `cp`, with the files on the disk."""
    forget(model)
    started = Spent.now()
    subprocess.run(["cp", "-r", "--reflink=never", str(model), str(target)], check=True)
    write_out(target)
    spent = started.since
    shutil.rmtree(target)
    return spent


def timed_job(model: Path, work: Path, scheme: str) -> tuple[Spent, dict[str, Any]]:
    """Of the job's process, with the files on the disk, and its report."""
    spec = JobSpec.model_validate(
        {"model": model.as_uri(), "recipe": {"method": "rtn", "scheme": scheme}, "evaluation": None}
    )
    work.mkdir()
    assignment = Assignment(
        spec=spec, model_folder=model, model_name="random", model_digest="0" * 64, calibration_digest="",
        work_folder=work,
    )  # fmt: skip
    forget(model)
    started = Spent.now()
    child = subprocess.run(
        [sys.executable, "-m", "workers.child", "--progress-fd", "1"],
        input=assignment.model_dump_json().encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    last = json.loads(child.stdout.splitlines()[-1])
    write_out(work)
    spent = started.since
    report: dict[str, Any] = json.loads((work / last["report"]).read_text())
    shutil.rmtree(work)
    return spent, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scheme", default="fp8")
    options = parser.parse_args()
    folder: Path = options.folder / "model-free"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make_model(folder / "model", options.layers)
        size = sum(path.stat().st_size for path in (folder / "model").iterdir())
        print(f"{size / 1e9:.2f} GB, scheme {options.scheme}")
        copies, jobs, peak = [], [], 0
        for number in range(options.rounds):
            copies.append(timed_copy(folder / "model", folder / "copy"))
            spent, report = timed_job(folder / "model", folder / "work", options.scheme)
            jobs.append(spent)
            peak = max(peak, report["peak_rss_bytes"])
            stages = {name: round(seconds, 2) for name, seconds in report["stages"].items()}
            print(
                f"round {number}: copy {copies[-1].wall:.1f} s ({copies[-1].processors:.1f} of processors), "
                f"job {spent.wall:.1f} s ({spent.processors:.1f} of processors; {stages})",
                flush=True,
            )
        copy, job = (statistics.median(each.wall for each in side) for side in (copies, jobs))
        print(f"medians: copy {copy:.1f} s, job {job:.1f} s, ratio {job / copy:.2f}")
        print(f"peak memory {peak / 1e9:.2f} GB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
