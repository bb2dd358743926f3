"""What bounds the CUDA kernels for few tokens, from their machine code and plans alone: no GPU is needed.

    python tests/benchmarks/decode_model.py
    python tests/benchmarks/decode_model.py --device h100 --m 1 16 32 --bits 4 --variant LEAN_FILL

For each shape and number of tokens: the plan that is chosen, and the least time that each resource allows.
`memory`: bytes at the device's rate of copying. `cache`: weights, and the activations that every block reads
anew for every unit, at the rate of the second cache. `issue`: instructions of the inner loop (counted in the
disassembly, so with those of branches that not every warp takes) at four in a cycle on the busiest processor.
`flight`: bytes of weights that can be on their way from memory, which by Little's law must cover rate times
latency. `waves` is the part of the processors' time that the deal of tiles leaves in use. Beside them the
times that were measured (docs/benchmarks.md), and the instructions in a cycle that they mean.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from kernels.cuda import decode, wide  # noqa: E402
from kernels.cuda.cubin_cache import CubinCache, register_counts  # noqa: E402
from kernels.cuda.decode import Device  # noqa: E402
from kernels.cuda.layout import TILE_ROWS, UNIT_CHANNELS, Format  # noqa: E402
from kernels.cuda.linear import DECODE_TOKENS  # noqa: E402

SHAPES = ("4096x4096", "4096x14336", "14336x4096", "8192x28672")
ISSUED = 4  # instructions that a processor starts in a cycle


@dataclass(frozen=True)
class Rates:
    """Of a device; what is not measured is an assumption."""

    device: Device
    memory: float  # bytes per second, copying: measured
    cache: float = 5.5e12  # assumed
    clock: float = 1.7e9  # assumed, under load
    latency: float = 0.9e-6  # of memory under load: assumed
    start: float = 2.0e-6  # of a kernel in a graph, before and after its loop: assumed


RATES = {"h100": Rates(Device(132, 232448), 2.996e12), "h200": Rates(Device(132, 232448), 4.247e12)}
# Microseconds in docs/benchmarks.md, W4 g128: by device, shape and tokens.
MEASURED = {
    "h100": {
        "4096x4096": {1: 5.7, 4: 6.4, 16: 8.0, 32: 11.0},
        "4096x14336": {1: 12.5, 4: 13.1, 16: 14.3, 32: 17.6},
        "14336x4096": {1: 12.8, 4: 13.5, 16: 16.4, 32: 20.4},
        "8192x28672": {1: 46.0, 4: 44.7, 16: 48.0, 32: 55.7},
    },
    "h200": {
        "4096x4096": {1: 5.46, 4: 5.86, 16: 7.82, 32: 10.5},
        "4096x14336": {1: 10.9, 4: 11.6, 16: 13.9, 32: 17.6},
        "14336x4096": {1: 12.4, 4: 12.9, 16: 15.2, 32: 20.2},
        "8192x28672": {1: 35.7, 4: 34.7, 16: 44.4, 32: 52.6},
    },
}


@dataclass(frozen=True)
class Work:
    """A plan, as the model sees it."""

    name: str
    source: str
    product: str  # the instruction that multiplies
    products: int  # of them in the inner loop of a warp
    defines: dict[str, int]
    blocks: int
    busiest: int  # units of the block with most to do
    units: int  # of all blocks
    strip_tiles: int  # records of a unit
    warp_tiles: int  # records that a warp takes in a turn of its loop
    tokens: int  # that a unit brings
    ring: int  # units in shared memory


def work_of(tokens: int, rows: int, channels: int, form: Format, device: Device) -> Work:
    units = -(-channels // UNIT_CHANNELS)
    if tokens <= DECODE_TOKENS:
        plan = decode.make_plan(tokens, rows, channels, form, device)
        shape, total = plan.shape, decode.strips_of(rows, plan.shape) * units
        name = f"decode {shape.row_tiles}x{shape.token_tiles}, {shape.row_warps} x {shape.splits} warps"
        return Work(
            f"{name}, {shape.stages} stages", decode.SOURCE, "HMMA", shape.row_tiles * shape.token_tiles * 8,
            shape.defines(form, torch.bfloat16), plan.blocks, -(-total // plan.blocks), total,
            shape.strip_tiles, shape.row_tiles, min(tokens, shape.tokens), shape.splits * shape.stages,
        )  # fmt: skip
    many = wide.make_plan(tokens, rows, channels, form, device)
    large, tiles = many.shape, wide.tiles_of(tokens, rows, many.shape)
    busiest = -(-tiles * units // many.blocks) if many.split else -(-tiles // many.blocks) * units
    name = f"wide {large.row_blocks}x{large.tokens}, {large.splits} splits"
    return Work(
        f"{name}, {large.stages} stages", wide.SOURCE, "HGMMA", large.row_blocks * 8,
        large.defines(form, torch.bfloat16), many.blocks, busiest, tiles * units, large.records,
        large.row_blocks, large.tokens, large.stages,
    )  # fmt: skip


# -------------------- machine code

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?) ;")
LABEL = re.compile(r"^(\.L_x_\d+):")
BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")


def disassembler() -> str:
    """nvdisasm of PATH, or the one that comes with Triton. Raises SystemExit where there is none."""
    found = shutil.which("nvdisasm")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        packaged = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(packaged) if packaged.exists() else None
    if found is None:
        raise SystemExit("no nvdisasm: neither on PATH nor in Triton's package")
    return found


def loops(listing: str) -> Iterator[list[str]]:
    """The instructions between each label and each later jump back to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := LINE.match(line):
            code.append(instruction[2])
            jump = BRANCH.search(instruction[2])
            if jump and jump[1] in labels:
                yield code[labels[jump[1]] :]


def inner_loop(work: Work, cache: CubinCache) -> tuple[int, int]:
    """Instructions of the shortest loop that holds a unit's products, and registers of a thread."""
    compiled = cache.get(work.source, "sm_90a", work.defines)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.code)
        file.flush()
        listing = subprocess.run(
            [disassembler(), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    holding = [
        len(loop) for loop in loops(listing) if sum(work.product in line for line in loop) >= work.products
    ]
    return min(holding, default=0), max(register_counts(compiled.report))


# -------------------- table


def line(shape: str, tokens: int, options: argparse.Namespace, cache: CubinCache) -> str:
    rates = RATES[options.device]
    channels, rows = (int(size) for size in shape.split("x"))
    form = Format(options.bits, 128, asymmetric=False, scale_dtype=torch.bfloat16)
    work = work_of(tokens, rows, channels, form, rates.device)
    instructions, registers = inner_loop(work, cache)
    records = -(-rows // TILE_ROWS) * -(-channels // UNIT_CHANNELS)
    weights = records * form.record_bytes
    memory = (weights + 2 * tokens * (channels + rows)) / rates.memory
    cached = (weights + work.units * work.tokens * UNIT_CHANNELS * 2) / rates.cache
    started = work.busiest * work.strip_tiles / work.warp_tiles * instructions
    issue = started / ISSUED / rates.clock
    waves = work.units / rates.device.processors / work.busiest
    flight = work.ring * work.strip_tiles * form.record_bytes
    needed = rates.memory * rates.latency / rates.device.processors
    measured = MEASURED[options.device].get(shape, {}).get(tokens) if options.bits == 4 else None
    seen = "| | |"
    if measured is not None:
        cycles = (measured * 1e-6 - rates.start) * rates.clock
        seen = f"| {measured} | {started / cycles:.2f} |"
    return (
        f"| {shape} | {tokens} | {work.name} | {work.blocks} | {waves:.2f} | {registers} "
        f"| {instructions / work.warp_tiles:.0f} | {flight / 1024:.0f} of {needed / 1024:.0f} "
        f"| {memory * 1e6:.1f} | {cached * 1e6:.1f} | {issue * 1e6:.1f} {seen}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=list(RATES), default="h200")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 8], default=4)
    parser.add_argument("--variant", choices=list(decode.VARIANTS), nargs="*", default=[])
    options = parser.parse_args()
    decode.VARIANTS.update(dict.fromkeys(options.variant, 1))
    cache = CubinCache()
    print(
        "| shape | M | plan | blocks | waves | registers | instructions a record and warp | KiB in flight "
        "| memory us | cache us | issue us | measured us | instructions a cycle |"
    )
    print("|" + "---|" * 13)
    for shape in options.shape:
        for tokens in options.m:
            print(line(shape, tokens, options, cache), flush=True)


if __name__ == "__main__":
    main()
