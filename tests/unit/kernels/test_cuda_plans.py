"""The choice of a kernel's shape, without a GPU: what was measured best is chosen, and everything fits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels.cuda import decode, linear, wide
from kernels.cuda.backend import CudaBackend
from kernels.cuda.decode import Device
from kernels.cuda.layout import Format, format_of
from kernels.cuda.workspace import Workspace
from kernels.product import LinearProduct
from tests.unit.kernels.weights import random_weight

H100, A100, ADA = Device(132, 232448), Device(108, 166912), Device(84, 101376)
W4 = Format(4, 128, asymmetric=False, scale_dtype=torch.bfloat16)
FORMATS = [
    Format(bits, group, asymmetric=True, scale_dtype=torch.float32)
    for bits, group in itertools.product((2, 3, 4, 8), (32, 64, 128))
]


@pytest.mark.parametrize(
    ("channels", "rows", "tokens", "shape", "blocks"),
    [
        (4096, 14336, 1, (7, 1, 8), 128),
        (4096, 14336, 8, (4, 2, 8), 112),
        (4096, 14336, 16, (2, 4, 4), 112),
        (14336, 4096, 1, (2, 1, 16), 128),
        (14336, 4096, 16, (2, 4, 4), 128),
        (4096, 4096, 16, (2, 1, 8), 128),
        (8192, 28672, 1, (7, 1, 8), 128),
        (8192, 28672, 16, (4, 4, 2), 112),
    ],
)
def test_few_tokens_get_the_shape_that_was_measured_best(
    channels: int, rows: int, tokens: int, shape: tuple[int, int, int], blocks: int
) -> None:
    plan = decode.make_plan(tokens, rows, channels, W4, H100)
    assert (plan.shape.row_tiles, plan.shape.row_warps, plan.shape.splits) == shape
    assert plan.blocks == blocks


def test_a_single_token_counts_places_instead_of_dividing() -> None:
    """The variant that was faster there and not beside more tokens."""
    one, eight = (decode.make_plan(tokens, 4096, 4096, W4, H100).shape for tokens in (1, 8))
    assert one.defines(W4, torch.bfloat16)["LEAN_FILL"] == 1
    assert eight.defines(W4, torch.bfloat16)["LEAN_FILL"] == 0


@pytest.mark.parametrize(
    ("channels", "rows", "tokens", "shape", "split"),
    [
        (4096, 14336, 32, (1, 32, 2), False),
        (4096, 14336, 64, (1, 64, 1), False),
        (4096, 14336, 256, (2, 128, 1), False),
        (14336, 4096, 32, (1, 32, 2), True),
        (14336, 4096, 256, (2, 128, 1), True),
        (8192, 28672, 32, (2, 32, 1), False),
        (8192, 28672, 2048, (2, 128, 1), False),
    ],
)
def test_many_tokens_get_the_shape_that_was_measured_best(
    channels: int, rows: int, tokens: int, shape: tuple[int, int, int], split: bool
) -> None:
    plan = wide.make_plan(tokens, rows, channels, W4, H100)
    assert (plan.shape.row_blocks, plan.shape.tokens, plan.shape.splits) == shape
    assert plan.split is split


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_fits_every_device(form: Format) -> None:
    for tokens, device in itertools.product((1, 8, 16, 32, 64), (H100, A100, ADA)):
        for channels, rows in ((32, 1), (4096, 1000), (8192, 28672)):
            plan = decode.make_plan(tokens, rows, channels, form, device)
            assert plan.shape.shared_bytes(form) <= device.shared_bytes
            units = -(-channels // 128)
            assert 1 <= plan.blocks <= decode.strips_of(rows, plan.shape) * units
    for tokens in (1, 100, 5000):
        many = wide.make_plan(tokens, 1000, 4096, form, H100)
        assert many.shape.shared_bytes(form) <= H100.shared_bytes


def test_the_backend_says_why_not() -> None:
    problem = LinearProduct(
        bits=4, group_size=-1, in_features=128, out_features=16, asymmetric=False, dtype=torch.float16,
        device_type="cuda", capability=(9, 0),
    )  # fmt: skip
    reasons = {
        "it runs on NVIDIA GPUs, not on cpu": replace(problem, device_type="cpu", capability=None),
        "it computes in float16 or bfloat16, not in float32": replace(problem, dtype=torch.float32),
        "in_features=100 is no multiple of 8": replace(problem, in_features=100),
        "there is no machine code for compute capability (7, 5)": replace(problem, capability=(7, 5)),
    }
    for reason, refused in reasons.items():
        assert CudaBackend().can_implement(refused) == reason


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)])
def test_the_operator_has_a_fake(tokens: tuple[int, ...]) -> None:
    x = torch.empty(*tokens, 128, device="meta", dtype=torch.bfloat16)
    records = torch.empty(1, 1, W4.record_bytes, device="meta", dtype=torch.uint8)
    output = torch.ops.nibble.cuda_linear(x, records, None, 16, 4, 128, False, torch.bfloat16)
    assert output.shape == (*tokens, 16)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.empty(2, 100, dtype=torch.bfloat16)},
            r"x has shape \(2, 100\); allowed: .*multiple of 8",
        ),
        ({"x": torch.empty(2, 136, dtype=torch.bfloat16)}, r"records has shape .*; allowed: \(2, 1, 1056\)"),
        ({"x": torch.empty(2, 128)}, "x is torch.float32; allowed: torch.float16, torch.bfloat16"),
        ({"records": torch.empty(1, 1, 1056)}, "records is torch.float32; allowed: torch.uint8"),
        ({"bias": torch.empty(4, dtype=torch.bfloat16)}, r"bias has shape \(4,\); allowed: \(16,\)"),
        ({"out_features": 17}, r"records has shape .*; allowed: \(1, 2, 1056\)"),
        ({"out_features": 0}, "out_features=0; allowed: 1 and more"),
        ({"bits": 5}, "bits=5; allowed: 2, 3, 4, 8"),
        ({"bits": 8}, r"records has shape .*; allowed: \(1, 1, 2080\)"),
        ({"group_size": -1}, "group_size=-1; allowed: 32, 64, 128"),
        ({"asymmetric": True}, r"records has shape .*; allowed: \(1, 1, 1072\)"),
        ({"scale_dtype": torch.float64}, "scale_dtype is torch.float64"),
    ],
)
def test_bad_arguments_of_the_operator_are_named(change: dict[str, object], message: str) -> None:
    """By the same check that precedes a launch."""
    arguments = {
        "x": torch.empty(2, 128, dtype=torch.bfloat16),
        "records": torch.empty(1, 1, W4.record_bytes, dtype=torch.uint8),
        "bias": None, "out_features": 16, "bits": 4, "group_size": 128, "asymmetric": False,
        "scale_dtype": torch.bfloat16,
    }  # fmt: skip
    values = [
        value.to("meta") if isinstance(value, torch.Tensor) else value
        for value in {**arguments, **change}.values()
    ]
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.nibble.cuda_linear(*values)


class RecordingLibrary:
    """Stands in for compiled kernels: what was asked for, as (source, name)."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, tuple[tuple[str, int], ...]]] = set()

    def function(self, source: str, name: str, device: int, defines: dict[str, int]) -> None:
        self.asked.add((source, tuple(sorted(defines.items()))))


@pytest.mark.parametrize(("capability", "device"), [((9, 0), H100), ((8, 0), A100)])
def test_loading_a_weight_brings_the_kernels_of_its_calls(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capability: tuple[int, int],
    device: Device,
) -> None:
    library = RecordingLibrary()
    shared = SimpleNamespace(
        decode=decode.DecodeKernel(library, Workspace()),  # type: ignore[arg-type]
        wide=wide.WideKernel(library, Workspace()),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(linear, "kernels", lambda: shared)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    for module in (decode, wide):
        monkeypatch.setattr(module, "device_of", lambda index: device)
    decode.hopper.cache_clear()
    request.addfinalizer(decode.hopper.cache_clear)
    weight = random_weight(1024, 512, asymmetric=True)
    linear.load_kernels(weight, torch.bfloat16, 0)
    loaded = set(library.asked)
    assert {source for source, _ in loaded} == ({"decode.cu", "wide.cu"} if device is H100 else {"decode.cu"})
    for tokens in range(1, 17):
        shared.decode.prepared_for((tokens, 512, 1024), format_of(weight), torch.bfloat16, 0)
    assert library.asked == loaded
