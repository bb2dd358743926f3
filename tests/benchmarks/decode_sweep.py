"""Times every shape of the decode kernel that fits a problem, and every way to deal its tiles, on this GPU.

    python tests/benchmarks/decode_sweep.py --shape 4096x14336 14336x4096 8192x28672 --m 1 8 16
    python tests/benchmarks/decode_sweep.py --m 1 --variant LEAN_FILL

W4 with groups of 128 in bfloat16. A line per shape: median microseconds of a call (graphs over copies of the
weight, as in kernels.py), the rule's cost, and the difference from the product of the shape that is chosen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import kernels_cuda  # noqa: E402

from kernels import layouts  # noqa: E402
from kernels.cuda import decode  # noqa: E402
from kernels.cuda.calls import Prepared  # noqa: E402
from kernels.cuda.decode import DecodeKernel, DecodePlan, deals, device_of, shapes_for, strips_of  # noqa: E402
from kernels.cuda.layout import UNIT_CHANNELS, format_of  # noqa: E402
from kernels.cuda.library import shared_library  # noqa: E402
from kernels.cuda.linear import make_records  # noqa: E402
from kernels.cuda.workspace import Workspace  # noqa: E402
from kernels.weight import PackedWeight  # noqa: E402

COPIES_BYTES = 400 * 1024**2


def random_weight(rows: int, channels: int) -> PackedWeight:
    words = layouts.packed_words(channels, 4)
    qweight = torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int32, device="cuda")
    scale = (torch.rand(rows, channels // 128, device="cuda") + 0.5).bfloat16() / 64
    return PackedWeight(qweight, scale, None, 4, 128, channels)


def measure(shape: str, tokens: int) -> None:
    channels, rows = (int(size) for size in shape.split("x"))
    weight = random_weight(rows, channels)
    form, records = format_of(weight), make_records(weight)
    copies = [records.clone() for _ in range(max(2, COPIES_BYTES // records.numel()))]
    kernel, device = DecodeKernel(shared_library(), Workspace()), device_of(0)
    x = torch.randn(tokens, channels, dtype=torch.bfloat16, device="cuda")

    def product(prepared: Prepared, held: Tensor, x: Tensor) -> Tensor:
        output = x.new_empty(tokens, rows)
        kernel.launch(prepared, x, held, None, output)
        return output

    units = -(-channels // UNIT_CHANNELS)
    chosen = decode.make_plan(tokens, rows, channels, form, device)
    expected = product(kernel.prepare_plan(chosen, rows, form, x.dtype, 0), records, x)
    for candidate, factor in shapes_for(tokens, form, device):
        strips = strips_of(rows, candidate)
        for blocks, sharing in deals(strips, units, device.processors):
            prepared = kernel.prepare_plan(DecodePlan(candidate, blocks), rows, form, x.dtype, 0)
            error = (product(prepared, records, x) - expected).abs().max() / expected.abs().max()
            calls = [lambda x, p=prepared, held=held: product(p, held, x) for held in copies]
            seconds = statistics.median(kernels_cuda.time_calls(calls, x))
            cost = decode.cost(candidate, blocks, sharing, strips, units) * factor
            mark = "chosen" if DecodePlan(candidate, blocks) == chosen else ""
            parts = candidate.row_tiles, candidate.row_warps, candidate.splits, candidate.stages
            print(
                f"| {shape} | {tokens} | {' '.join(map(str, parts))} | {blocks} | {seconds * 1e6:.2f} "
                f"| {cost:.0f} | {float(error):.1e} | {mark} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4096x14336", "14336x4096", "8192x28672"])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--variant", choices=list(decode.VARIANTS), nargs="*", default=[])
    options = parser.parse_args()
    decode.VARIANTS.update(dict.fromkeys(options.variant, 1))
    print(f"# {torch.cuda.get_device_name()}, driver {kernels_cuda.driver_version()}, {decode.VARIANTS}")
    print("| shape | M | row tiles, row warps, splits, stages | blocks | us | cost | difference | |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shape:
        for tokens in options.m:
            measure(shape, tokens)


if __name__ == "__main__":
    main()
