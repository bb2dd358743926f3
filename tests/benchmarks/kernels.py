"""Matrix products of packed weights beside their roofline, a dense product and every peer in the same run.

    python tests/benchmarks/kernels.py --device cpu --threads 1
    python tests/benchmarks/kernels.py --device cpu --shape 4096x4096 --m 1 16 --bits 4 --group 128
    python tests/benchmarks/kernels.py --device cuda --bits 2 3 8
    MARLIN_SOURCE=gptqmodel-7.7.0 python tests/benchmarks/kernels.py --device cuda  # kernel_peers.py says how

Shapes are in_features x out_features. Each candidate is first compared with float64 on fresh random inputs,
and dropped from the table if it is wrong. Candidates then take turns, on the CPU call by call, each over
copies of the weight that together exceed the cache. With one CPU thread times are its processor time, so
other programs disturb them through caches and memory only. The floor is the larger of two times: that of the
bytes of packed weight, input and output at the measured rate of reading, and that of the operations at the
measured rate of a dense product in the cache. The ratio is the dense product's time over a candidate's of the
same turn: median and quartiles of all turns. Figures go to a table and, with --json, to a file.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import kernel_peers  # noqa: E402
import kernels_cuda  # noqa: E402

from kernels import layouts  # noqa: E402
from kernels.backend import backends_of  # noqa: E402
from kernels.product import LinearProduct  # noqa: E402
from kernels.weight import PackedWeight  # noqa: E402

SHAPES = ("4096x4096", "4096x14336", "14336x4096", "8192x28672")
ROWS = (1, 4, 16, 32, 64, 256, 2048)
DENSE = "torch bf16"
MIN_TURNS = 7
TOLERANCE = 2e-2  # of the largest output, against float64: three roundings to bfloat16

Product = Callable[[Tensor], Tensor]


@dataclass
class Candidate:
    """One way to compute: copies of a weight that calls take in turn."""

    name: str
    copies: list[Product]
    error: float = float("nan")
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are microseconds."""

    shape: str
    rows: int
    scheme: str
    candidate: str
    best_us: float
    median_us: float
    floor_us: float
    fraction: float  # of the floor's rate that the best time reaches
    ratio: float  # of the dense product's time to this one's in the same turn: the median
    ratio_quartiles: tuple[float, float]
    error: float


@dataclass(frozen=True)
class Device:
    """What the benchmark needs of a device: its rates, its cache, and how calls are timed."""

    name: str
    torch_device: torch.device
    read_rate: float  # bytes per second
    product_rate: float  # operations per second
    rotation_bytes: int  # that the copies of a weight take together, at least
    time_turns: Callable[[list[Candidate], Tensor], dict[str, list[float]]]  # seconds of calls, by name
    peers: Callable[[PackedWeight, int], list[Candidate]]  # others' kernels, with copies of the weight


# -------------------- CPU


def cpu_device(options: argparse.Namespace) -> Device:
    torch.set_num_threads(options.threads)
    return Device(
        name=f"{cpu_name()}, {options.threads} threads",
        torch_device=torch.device("cpu"),
        read_rate=options.read_gbps * 1e9 if options.read_gbps else cpu_read_rate(options.threads),
        product_rate=cpu_product_rate(),
        rotation_bytes=options.rotation_mib * 1024**2,
        time_turns=lambda candidates, x: time_cpu_turns(candidates, x, options.rounds * options.budget_s),
        peers=lambda weight, copies: [],  # PyTorch's own operators are a backend of ours: `aten`
    )


def cuda_device(options: argparse.Namespace) -> Device:
    def peers(weight: PackedWeight, copies: int) -> list[Candidate]:
        made = kernel_peers.peers(weight, options.peers)
        return [Candidate(name, [make() for _ in range(copies)]) for name, make in made]

    def time_turns(candidates: list[Candidate], x: Tensor) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
        for _ in range(options.rounds):
            for candidate in candidates:
                found[candidate.name] += kernels_cuda.time_calls(candidate.copies, x)
        return found

    return Device(**kernels_cuda.device_arguments(options), time_turns=time_turns, peers=peers)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


# One stream of addresses, and four: a processor has more reads under way in several pages than in one.
READ_SOURCE = """
#include <stddef.h>
#include <stdint.h>
typedef uint64_t v8 __attribute__((vector_size(64)));
uint64_t read_all(const v8* p, size_t n, size_t streams) {
  v8 sums[4] = {};
  size_t part = n / streams;
  for (size_t i = 0; i < part; i += 4)
    for (size_t s = 0; s < streams; ++s)
      for (size_t k = 0; k < 4; ++k) sums[k] ^= p[s * part + i + k];
  sums[0] ^= sums[1] ^ sums[2] ^ sums[3];
  return sums[0][0] ^ sums[0][7];
}
"""


def cpu_read_rate(threads: int) -> float:
    """Bytes per second of threads that read, the best of several passes over a gibibyte each."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(READ_SOURCE)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
        read_all = ctypes.CDLL(str(library)).read_all
    read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    part = 2**26
    memory = [torch.ones(2**30, dtype=torch.uint8) for _ in range(threads)]

    def best(address: int, streams: int) -> float:
        starts = range(address, address + 2**30, part)
        return min(seconds(lambda start=start: read_all(start, part // 64, streams)) for start in starts)

    with ThreadPoolExecutor(threads) as pool:

        def rate(streams: int) -> float:
            passes = [list(pool.map(lambda t: best(t.data_ptr(), streams), memory)) for _ in range(4)]
            return max(sum(part / fastest for fastest in each) for each in passes)

        one, four = rate(1), rate(4)
    print(f"# each thread reading one stream: {one / 1e9:.1f} GB/s, four streams: {four / 1e9:.1f} GB/s")
    return max(one, four)


def cpu_product_rate() -> float:
    """Operations per second of a dense bfloat16 product that stays in the cache."""
    a, b = torch.randn(512, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    best = min(seconds(lambda: torch.nn.functional.linear(a, b)) for _ in range(50))
    return 2 * 512 * 1024 * 1024 / best


def time_cpu_turns(candidates: list[Candidate], x: Tensor, budget_s: float) -> dict[str, list[float]]:
    """One call of each candidate in turn, with its next copy, until the budgets are spent."""
    found: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    spent, turn = 0.0, 0
    while turn < MIN_TURNS or spent < budget_s * len(candidates):
        for candidate in candidates:
            product = candidate.copies[turn % len(candidate.copies)]
            found[candidate.name].append(seconds(lambda product=product: product(x)))
            spent += found[candidate.name][-1]
        turn += 1
    return found


def seconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def clock() -> float:
    """A single thread's own seconds: what else runs on its processor is not in them."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


# -------------------- candidates


def random_weight(
    shape: str, bits: int, group: int, device: torch.device, *, asymmetric: bool
) -> PackedWeight:
    in_features, out_features = (int(size) for size in shape.split("x"))
    groups = 1 if group == -1 else in_features // group

    def integers(columns: int) -> Tensor:
        return torch.randint(0, 2**bits, (out_features, columns), dtype=torch.uint8, device=device)

    q, zero = integers(in_features), integers(groups) if asymmetric else None
    scale = (torch.rand(out_features, groups, device=device) + 0.5) * 2.0 ** (-bits - 2)
    # bfloat16 where a peer takes no other scales; a float16 layer stores what it computes in.
    scale = scale.to(torch.float16 if device.type == "cpu" else torch.bfloat16)
    return PackedWeight(layouts.pack_rows(q, bits), scale, zero, bits, group, in_features)


def dense_weight(weight: PackedWeight) -> Tensor:
    """float32, by other steps than the kernels' own."""
    q = layouts.unpack_rows(weight.qweight, weight.bits, weight.in_features).float()
    zero = torch.full_like(weight.scale, 2.0 ** (weight.bits - 1)) if weight.zero is None else weight.zero
    zero, scale = (
        part.float().repeat_interleave(weight.channels_per_group, dim=1) for part in (zero, weight.scale)
    )
    return (q - zero) * scale


def copies_for(device: Device, size: int) -> int:
    return max(2, -(-device.rotation_bytes // max(size, 1)))


def dense_candidate(dense: Tensor, device: Device) -> Candidate:
    half = dense.bfloat16()
    count = copies_for(device, half.numel() * 2)
    held = [half.clone().to(device.torch_device) for _ in range(count)]
    return Candidate(DENSE, [lambda x, w=w: torch.nn.functional.linear(x, w) for w in held])


def our_candidates(weight: PackedWeight, device: Device, names: list[str] | None) -> list[Candidate]:
    problem = LinearProduct.of(weight, torch.bfloat16, device.torch_device)
    found = []
    for backend in backends_of(device.torch_device.type):
        if (names and backend.name not in names) or (not names and backend.name == "torch"):
            continue
        if (why := backend.can_implement(problem)) is not None:
            print(f"# {backend.name}: {why}")
            continue
        count = copies_for(device, weight.packed_bytes)
        kernel = backend.prepare(weight, torch.bfloat16, device.torch_device)
        kernels = [kernel, *(copy.deepcopy(kernel) for _ in range(count - 1))]
        found.append(Candidate(backend.name, [lambda x, k=k: k(x, None) for k in kernels]))
    return found


def check(candidates: list[Candidate], dense: Tensor, device: Device, rows: int) -> list[Candidate]:
    """Those that agree with float64 on a fresh input; some of its rows are compared where there are many."""
    x = torch.randn(rows, dense.shape[1], device=device.torch_device).bfloat16()
    some = torch.randperm(rows, device=device.torch_device)[:16]
    expected = torch.cat([x[some].double() @ part.double().T for part in dense.split(4096)], dim=1)
    right = []
    for candidate in candidates:
        output = candidate.copies[-1](x)[some].double()
        candidate.error = float((output - expected).abs().max() / expected.abs().max())
        if candidate.error < TOLERANCE:  # not of a NaN
            right.append(candidate)
        else:
            print(f"# {candidate.name} is wrong at M = {rows}: relative error {candidate.error:.1e}")
    return right


# -------------------- table


def floor_seconds(weight: PackedWeight, rows: int, device: Device, candidate: str) -> float:
    """The least time that bytes and operations take; the dense product reads 16 bits for each weight."""
    size = weight.in_features * weight.out_features
    stored = 2 * size if candidate == DENSE else weight.packed_bytes
    moved = stored + 2 * rows * (weight.in_features + weight.out_features)
    return max(moved / device.read_rate, 2 * rows * size / device.product_rate)


def measure(shape: str, bits: int, options: argparse.Namespace, device: Device) -> list[Row]:
    scheme = f"w{bits} " + ("channel" if options.group == -1 else f"g{options.group}")
    weight = random_weight(shape, bits, options.group, device.torch_device, asymmetric=options.asymmetric)
    dense = dense_weight(weight)
    candidates = [dense_candidate(dense, device), *our_candidates(weight, device, options.backend)]
    candidates += device.peers(weight, copies_for(device, weight.packed_bytes))
    lines = []
    for rows in options.m:
        right = check(candidates, dense, device, rows)
        x = torch.randn(rows, weight.in_features).bfloat16().to(device.torch_device)
        times = device.time_turns(right, x)
        for candidate in right:
            floor = floor_seconds(weight, rows, device, candidate.name)
            lines.append(row_of((shape, rows, scheme), candidate, times, floor))
            print_row(lines[-1])
    cap = weight.in_features * weight.out_features * 2 / weight.packed_bytes
    print(f"# {shape} {scheme}: a ratio of {cap:.2f} is that of the bytes, where both read at the same rate")
    return lines


def row_of(
    what: tuple[str, int, str], candidate: Candidate, times: dict[str, list[float]], floor: float
) -> Row:
    own = times[candidate.name]
    # A turn may hold more calls of one than of another where graphs were replayed.
    ratios = [dense / mine for dense, mine in zip(times.get(DENSE, []), own, strict=False)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [float("nan")] * 3
    return Row(
        *what, candidate.name, min(own) * 1e6, statistics.median(own) * 1e6, floor * 1e6, floor / min(own),
        middle, (low, high), candidate.error,
    )  # fmt: skip


def print_row(row: Row) -> None:
    print(
        f"| {row.shape} | {row.rows} | {row.scheme} | {row.candidate} | {row.best_us:.1f} "
        f"| {row.median_us:.1f} | {row.floor_us:.1f} | {row.fraction:.2f} | {row.ratio:.2f} "
        f"({row.ratio_quartiles[0]:.2f}-{row.ratio_quartiles[1]:.2f}) | {row.error:.1e} |",
        flush=True,
    )


def commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--bits", nargs="+", type=int, choices=[2, 3, 4, 8], default=[4])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--backend", nargs="+", help="only these of ours; default: all but `torch`")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(kernel_peers.PEERS),
        default=list(kernel_peers.PEERS),
        help="those that are not installed are left out, and named",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=0.3, help="of each candidate in each round")
    parser.add_argument("--rotation-mib", type=int, default=400, help="of copies of each weight")
    parser.add_argument("--read-gbps", type=float, help="in place of measuring")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    device = cpu_device(options) if options.device == "cpu" else cuda_device(options)
    print(
        f"# {device.name}; torch {torch.__version__}; Python {platform.python_version()}; commit {commit()}"
    )
    print(f"# reading {device.read_rate / 1e9:.1f} GB/s, product {device.product_rate / 1e12:.2f} TFLOP/s")
    columns = "shape | M | scheme | kernel | best us | median us | floor us | of the floor"
    print(f"| {columns} | ratio (quartiles) | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    runs = [(shape, bits) for shape in options.shape for bits in options.bits]
    lines = [line for shape, bits in runs for line in measure(shape, bits, options, device)]
    if options.json:
        content = {
            "device": device.name, "torch": torch.__version__, "commit": commit(),
            "read_rate": device.read_rate, "product_rate": device.product_rate,
            "rows": [asdict(line) for line in lines],
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
