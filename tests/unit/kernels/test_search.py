"""The search's operators: like their slow references, with true fakes, and strict about arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from kernels.search import search_reference as reference
from kernels.search.grids import GridRule
from kernels.search.search_operators import clip_step, rounding_errors

RULES = [
    GridRule(bits, symmetric, dtype)
    for bits, dtype in ((2, torch.float16), (3, torch.bfloat16), (4, torch.bfloat16), (8, torch.float32))
    for symmetric in (False, True)
]
JOINT, SIDE = (0.95, 0.8, 0.6), (1.1, 0.9)


def named(rule: GridRule) -> str:
    return f"w{rule.bits}{'s' if rule.symmetric else 'a'}"


def group(size: int, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a second moment, and the error of other groups times their cross block of it."""
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(rows, size, generator=generator)
    x = torch.randn(3 * size, size, generator=generator)
    others = torch.randn(rows, size, generator=generator) * 0.05
    return weight, x.T @ x / len(x), others


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_rounding_errors(rule: GridRule, group_size: int) -> None:
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(3, 128, generator=generator)
    scales = torch.rand(2, 128, generator=generator) + 0.5
    arguments = (weight, scales, rule.bits, group_size, rule.symmetric, rule.dtype, 0.9)
    errors = rounding_errors(*arguments, torch.float32)
    expected = reference.rounding_errors(weight, scales, rule, group_size, 0.9)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-5, atol=2e-6)
    half = rounding_errors(*arguments, torch.bfloat16)
    torch.testing.assert_close(half, errors.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("joint", [JOINT, ()], ids=["first visit", "second visit"])
def test_clip_step(rule: GridRule, joint: tuple[float, ...]) -> None:
    weight, block, others = group(32)
    start = torch.ones(2, 7)
    ranges = torch.cat([start, torch.full((2, 7), torch.nan)])
    error = torch.full_like(weight, torch.nan)
    grid = (joint, SIDE, rule.bits, rule.symmetric, rule.dtype)
    clip_step(weight, block, others, error, ranges, *grid)
    expected, losses = reference.clip_step(weight, block, others, start, joint, SIDE, rule)
    own = error.double()
    loss = ((own @ block.double()) * own).sum(dim=1) + 2 * (own * others.double()).sum(dim=1)
    torch.testing.assert_close(loss, losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=2e-6)
    rounded = rule.nearest(weight, ranges[2, :, None], ranges[3, :, None])
    assert torch.equal(error, rounded - weight)


def test_the_step_goes_on_where_it_stopped() -> None:
    """A second visit with the factors found, and strided views of larger tensors, as the search uses it."""
    weight, block, others = group(64)
    rule = GridRule(3, False, torch.bfloat16)
    wide, moment = torch.randn(7, 192), torch.zeros(192, 192)
    wide[:, 64:128], moment[64:128, 64:128] = weight, block
    error = torch.zeros(7, 192)
    ranges = torch.ones(4, 7)
    part = slice(64, 128)
    grid = (rule.bits, rule.symmetric, rule.dtype)
    for joint in (JOINT, ()):
        start = ranges[:2].clone()
        clip_step(wide[:, part], moment[part, part], others, error[:, part], ranges, joint, SIDE, *grid)
        expected, _ = reference.clip_step(weight, block, others, start, joint, SIDE, rule)
        torch.testing.assert_close(error[:, part].double(), expected, rtol=1e-5, atol=2e-6)
    assert float(error[:, :64].abs().max()) == float(error[:, 128:].abs().max()) == 0.0


def test_schemas_and_fakes() -> None:
    weight, block, others = group(32)
    grid = (4, False, torch.bfloat16)
    opcheck(clip_step, (weight, block, others, torch.zeros(7, 32), torch.ones(4, 7), JOINT, SIDE, *grid))
    opcheck(rounding_errors, (weight, torch.ones(2, 32), 4, 32, False, torch.float16, 1.0, torch.bfloat16))


def test_no_rows() -> None:
    weight, block, others = (tensor[:0] if index != 1 else tensor for index, tensor in enumerate(group(32)))
    clip_step(weight, block, others, weight.clone(), torch.ones(4, 0), JOINT, SIDE, 4, False, torch.float16)
    errors = rounding_errors(weight, torch.ones(2, 32), 4, 32, False, torch.float16, 1.0, torch.float32)
    assert errors.shape == (2, 0, 32)


def call_rounding(**changed: object) -> None:
    arguments: dict[str, object] = {
        "weight": torch.ones(2, 64), "scales": torch.ones(1, 64), "bits": 4, "group_size": 32,
        "symmetric": False, "scale_dtype": torch.float16, "range_factor": 1.0, "error_dtype": torch.float32,
    }  # fmt: skip
    rounding_errors(**{**arguments, **changed})


def call_clip(**changed: object) -> None:
    arguments: dict[str, object] = {
        "weight": torch.ones(2, 32), "block": torch.eye(32), "others": torch.ones(2, 32),
        "error": torch.ones(2, 32), "ranges": torch.ones(4, 2), "joint": JOINT, "side": SIDE, "bits": 4,
        "symmetric": False, "scale_dtype": torch.float16,
    }  # fmt: skip
    clip_step(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (call_rounding, {"weight": torch.ones(2, 64).half()}, r"weight is torch\.float16"),
        (call_rounding, {"weight": torch.ones(64)}, "weight has 1 dimensions"),
        (call_rounding, {"weight": torch.ones(64, 2).T}, "weight has strides"),
        (call_rounding, {"scales": torch.ones(1, 32)}, r"scales has shape \(1, 32\)"),
        (call_rounding, {"group_size": 48}, "group_size=48"),
        (call_rounding, {"group_size": 128}, "in_features=64"),
        (call_rounding, {"bits": 5}, "bits=5"),
        (call_rounding, {"error_dtype": torch.float16}, r"error_dtype is torch\.float16"),
        (call_clip, {"block": torch.ones(32, 31)}, r"block has shape \(32, 31\)"),
        (call_clip, {"others": torch.ones(3, 32)}, r"others has shape \(3, 32\)"),
        (call_clip, {"ranges": torch.ones(2, 2)}, r"ranges has shape \(2, 2\)"),
        (call_clip, {"error": torch.ones(32, 2).T}, "error has strides"),
        (call_clip, {"weight": torch.ones(2, 32).double()}, r"weight is torch\.float64"),
        (call_clip, {"scale_dtype": torch.int8}, r"scale_dtype is torch\.int8"),
        (call_clip, {"block": torch.empty(32, 32, device="meta")}, "block is on meta"),
    ],
)
def test_bad_arguments_are_named(call: Callable[..., None], changed: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(**changed)
