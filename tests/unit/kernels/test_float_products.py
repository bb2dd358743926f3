"""PyTorch's float32 products with all of AVX-512: exact, the same on any number of threads, used by jobs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import float_products
from kernels.cpu.float_products import NEEDED, products_are_exact, use_whole_vectors, usual_products
from kernels.cpu.native_library import TILES_NEED
from tests import float_precision
from workers.quantization.input_statistics import InputCollector, add_product

CPU = torch.device("cpu")
AMD, INTEL = "AMD EPYC 9575F 64-Core Processor", "Intel(R) Xeon(R) Platinum 8480+"


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    threads = torch.get_num_threads()
    with float_precision.restored():
        yield
    torch.set_num_threads(threads)
    assert torch.get_float32_matmul_precision() == "highest"


def pretend(
    monkeypatch: pytest.MonkeyPatch, model: str, features: frozenset[str], *, exact: bool = True
) -> None:
    monkeypatch.setattr(float_products, "processor", lambda: (model, features))
    monkeypatch.setattr(float_products, "products_are_exact", lambda: exact)


@pytest.mark.parametrize(
    ("device", "model", "features", "expected"),
    [
        ("cpu", AMD, NEEDED, True),
        ("cuda", AMD, NEEDED, False),
        ("cpu", INTEL, NEEDED, False),
        ("cpu", AMD, TILES_NEED, False),  # bfloat16 would be used
        ("cpu", AMD, NEEDED - {"avx512_bf16"}, False),
    ],
)
def test_only_amd_without_matrix_units(
    monkeypatch: pytest.MonkeyPatch, device: str, model: str, features: frozenset[str], expected: bool
) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    pretend(monkeypatch, model, features)
    assert use_whole_vectors(torch.device(device)) is expected
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if expected else before)


def test_nothing_changes_where_products_lose_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    pretend(monkeypatch, AMD, NEEDED, exact=False)
    assert not use_whole_vectors(CPU)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_usual_products_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, AMD, NEEDED)
    assert use_whole_vectors(CPU)
    with usual_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_products_in_bfloat16_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products_are_exact()
    product = Tensor.__matmul__

    def rounded(left: Tensor, right: Tensor) -> Tensor:
        if left.dtype != torch.float32:
            return product(left, right)
        return product(left.bfloat16().float(), right.bfloat16().float())

    monkeypatch.setattr(Tensor, "__matmul__", rounded)
    assert not products_are_exact()


def test_threads_do_not_change_a_bit() -> None:
    """Of the products of a job: linears, second moments in blocks, and errors with a moment."""
    if not use_whole_vectors(CPU):
        pytest.skip("the processor is not one of AMD's with AVX-512")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4096, 576, generator=generator), torch.randn(1536, 576, generator=generator)
    moment, errors = torch.randn(576, 576, generator=generator), torch.randn(70, 576, generator=generator)

    def products(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        total, collector = torch.ones(64, 64), InputCollector()
        add_product(total, x[:, 512:], x[:, 512:])
        collector.add(x)
        return [
            torch.nn.functional.linear(x.view(8, 512, 576), weight),
            total,
            collector.result("x").moment,
            errors @ moment[:, 64:128],
            torch.zeros(448, 1536).addmm_(moment[:128, 128:].T, weight.T[:128], alpha=-1),
        ]

    alone = products(1)
    for threads in (2, 3, 8):
        for one, other in zip(alone, products(threads), strict=True):
            assert torch.equal(one, other)


STARTS = """
import io, sys, torch
from pathlib import Path
from workers.child import __main__ as job, calibration_rank
from workers.child.ranks import RankAssignment, SharedLayers
from app.core.child.assignment import Assignment
from workers.devices import profile_measurement

folder = Path(sys.argv[1])
texts = {"model_name": "m", "model_digest": "0", "calibration_digest": "0"}
assignment = Assignment(spec={"model": "file:///m"}, model_folder=folder, work_folder=folder, **texts)
shared = SharedLayers(start=0, stop=1)
rank = RankAssignment(assignment=assignment, shared=shared, rank=1, size=2, rendezvous=folder / "meet")

def note(*_):
    print(torch.backends.mkldnn.matmul.fp32_precision)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    return ()

job.run = calibration_rank.run = profile_measurement.measure = note
for process, words, text in (
    (job, ["--progress-fd", "1"], assignment.model_dump_json()),
    (calibration_rank, [], rank.model_dump_json()),
    (profile_measurement, ["--device", "cpu", "--folder", str(folder)], ""),
):
    sys.argv, sys.stdin = ["process", *words], io.StringIO(text)
    process.main()
"""


def test_whoever_computes_for_jobs_uses_whole_vectors(tmp_path: Path) -> None:
    """A job's process, that of a further device, and the measurement of this host's rates."""
    expected = "bf16" if use_whole_vectors(CPU) else "none"
    done = subprocess.run(
        [sys.executable, "-c", STARTS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected] * 3
