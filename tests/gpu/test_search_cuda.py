"""The search's fused kernels beside the same operators on the CPU."""

from __future__ import annotations

import pytest
import torch

from app.core.planning.format_limits import Scheme
from kernels.search.cuda import runs_on
from kernels.search.losses import row_losses
from kernels.search.operators import clip_step, rounding_errors
from workers.quantization.clip_search import search_clip

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


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), RULES)
@pytest.mark.parametrize(("rows", "size"), [(5, 32), (100, 64), (1000, 128), (9001, 128)])
def test_clip_step(bits: int, rows: int, size: int, dtype: torch.dtype, *, symmetric: bool) -> None:
    """The kernel multiplies in tf32: another range may win a near tie, and none loses more than that."""
    weight, x, others = torch.randn(rows, 3 * size), torch.randn(4 * size, 3 * size), torch.randn(rows, size)
    moment, part = x.T @ x / len(x), slice(size, 2 * size)
    block, others = moment[part, part].clone(), others * 0.1 * weight.std()
    losses, ranges, errors = [], [], []
    for device in ("cpu", "cuda"):
        group = [tensor.to(device) for tensor in (weight, moment, others)]
        error = torch.full((rows, 3 * size), torch.nan, device=device)
        found = torch.cat([torch.ones(2, rows), torch.full((2, rows), torch.nan)]).to(device)
        for joint in (JOINT, ()):
            clip_step(
                group[0][:, part], group[1][part, part], group[2], error[:, part], found, joint, SIDE,
                bits, symmetric, dtype,
            )  # fmt: skip
        own = error[:, part].cpu()
        losses.append(((own.double() @ block.double() + 2 * others.double()) * own.double()).sum(dim=1))
        ranges.append(found.cpu())
        errors.append(own)
        assert bool(error[:, :size].isnan().all())
        assert bool(error[:, 2 * size :].isnan().all())
    assert float((losses[1] - losses[0]).mean()) < 1e-3 * float(losses[0].abs().mean())
    same = (ranges[0] == ranges[1]).all(dim=0)
    assert float(same.float().mean()) > 0.98
    assert torch.equal(errors[0][same], errors[1][same])


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
