"""The search's fused kernels: rounding to the bit, choices and losses by float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.core.formats.file_format import Scheme
from kernels.search.cuda import runs_on
from kernels.search.grids import GridRule
from kernels.search.losses import row_losses
from kernels.search.search_operators import clip_step, rounding_errors
from tests.clip_judge import UNITS, Judge
from workers.quantization.clip_search import search_clip

GPU = torch.device("cuda", 0)
RULES = [
    (bits, symmetric, dtype)
    for bits, dtype in ((2, torch.float16), (3, torch.bfloat16), (4, torch.bfloat16), (8, torch.float16))
    for symmetric in (False, True)
]
JOINT, SIDE = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5), (1.1, 1.05, 0.95, 0.9)


def test_the_kernels_run() -> None:
    assert runs_on(0)


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), RULES)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_rounding_errors(bits: int, size: int, dtype: torch.dtype, *, symmetric: bool) -> None:
    weight, scales = torch.randn(37, 384), torch.rand(5, 384) + 0.5
    for error_dtype in (torch.float32, torch.bfloat16):
        arguments = (bits, size, symmetric, dtype, 0.9, error_dtype)
        expected = rounding_errors(weight, scales, *arguments)
        found = rounding_errors(weight.cuda(), scales.cuda(), *arguments).cpu()
        assert torch.equal(found, expected)


Group = tuple[Tensor, Tensor, Tensor]
CLIP_SHAPES = [(5, 32), (100, 64), (1000, 128), (9001, 128)]  # no multiples of what a warp or a block holds


def middle_group(rows: int, size: int) -> Group:
    """Weights, block of H and others of the middle one of three groups: views of larger tensors."""
    weight, x = torch.randn(rows, 3 * size), torch.randn(4 * size, 3 * size)
    others = 0.1 * weight.std() * torch.randn(rows, size)
    part = slice(size, 2 * size)
    return weight.cuda()[:, part], (x.T @ x / len(x)).cuda()[part, part], others.cuda()


def stepped(group: Group, start: Tensor, joint: tuple[float, ...], rule: GridRule) -> tuple[Tensor, Tensor]:
    """Error, in the middle of NaN that must stay, and ranges."""
    rows, size = group[0].shape
    error = torch.full((rows, 3 * size), torch.nan, device=GPU)
    ranges = torch.cat([start, torch.full_like(start, torch.nan)])
    part = slice(size, 2 * size)
    clip_step(*group, error[:, part], ranges, joint, SIDE, rule.bits, rule.symmetric, rule.dtype)
    assert bool(error[:, :size].isnan().all())
    assert bool(error[:, 2 * size :].isnan().all())
    return error[:, part], ranges


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), RULES)
@pytest.mark.parametrize(("rows", "size"), CLIP_SHAPES)
def test_clip_step(bits: int, rows: int, size: int, dtype: torch.dtype, *, symmetric: bool) -> None:
    """Every choice is the best one by losses in float64, up to what tf32 rounds; see tests/clip_judge.py.

    Not the CPU's choices: on a CPU with AMX those are bfloat16's. The kernel's arithmetic, imitated on a CPU,
    finds the ranges of exact losses for 99.8 % of 1000 rows and more, and a sum of losses within 3e-4.
    """
    group, rule = middle_group(rows, size), GridRule(bits, symmetric, dtype)
    judge = Judge(*group, rule, UNITS["tf32"])
    start = torch.ones(2, rows, device=GPU)
    for joint in (JOINT, ()):
        error, ranges = stepped(group, start, joint, rule)
        found = ranges[:2]
        wrong = ~judge.right(start, found, joint, SIDE)
        assert not wrong.any(), f"rows {wrong.nonzero().flatten().tolist()[:20]}"
        scale, zero = ranges[2:]
        assert torch.equal(error, rule.nearest(group[0], scale[:, None], zero[:, None]) - group[0])
        if rows >= 1000:
            best = judge.best(start, joint, SIDE)
            assert float((found == best).all(dim=0).double().mean()) > 0.995
            exact, own = (judge.losses(factors[None])[0].sum() for factors in (best, found))
            assert float(own) == pytest.approx(float(exact), rel=1e-3)
        start = found.clone()


@pytest.mark.parametrize(("rows", "size"), CLIP_SHAPES)
def test_every_launch_gives_the_same_bits(rows: int, size: int) -> None:
    """A race shows as a difference: nothing is added in an order that is not fixed."""
    group, rule = middle_group(rows, size), GridRule(2, False, torch.float16)
    start = torch.ones(2, rows, device=GPU)
    first = stepped(group, start, JOINT, rule)
    for _ in range(100):
        again = stepped(group, start, JOINT, rule)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_the_whole_clip_search(group_size: int) -> None:
    weight, x = torch.randn(300, 512), torch.randn(2000, 512) @ torch.randn(512, 512) / 20
    moment = x.T @ x / len(x)
    scheme = Scheme(bits=3, group_size=group_size, symmetric=False)
    _, before, after = search_clip(weight, moment, scheme, torch.bfloat16)
    _, before_cuda, after_cuda = search_clip(weight.cuda(), moment.cuda(), scheme, torch.bfloat16)
    torch.testing.assert_close(before_cuda.cpu(), before, rtol=3e-3, atol=0)
    torch.testing.assert_close(after_cuda.sum().cpu(), after.sum(), rtol=3e-3, atol=0)


def test_row_losses_on_matrix_units() -> None:
    errors, x = torch.randn(100, 3000), torch.randn(4000, 3000)
    moment = x.T @ x / len(x)
    exact = ((errors.double() @ moment.double()) * errors.double()).sum(dim=1)
    found = row_losses(errors.cuda(), moment.cuda()).cpu()
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=0)
    assert torch.get_float32_matmul_precision() == "highest"
