"""The compiled search of CPUs: on tiles, on vectors and without a compiler the same ranges are found."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import fallbacks
from kernels.cpu.native_library import SEARCH, NotCompiled, built
from kernels.search import cpu
from kernels.search.grids import GridRule
from kernels.search.losses import add_row_dots, quick_row_losses, row_losses
from kernels.search.search_operators import clip_step, clip_visit, rounding_errors, search_backend
from tests.clip_judge import UNITS, Judge

RULES = [
    GridRule(bits, symmetric, dtype)
    for bits, dtype in ((2, torch.float16), (4, torch.bfloat16), (8, torch.float32))
    for symmetric in (False, True)
]
JOINT, SIDE = (0.95, 0.9, 0.8, 0.7), (1.1, 0.95, 0.85)
CPU = torch.device("cpu")


def named(rule: GridRule) -> str:
    return f"w{rule.bits}{'s' if rule.symmetric else 'a'}"


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The search on AMX's tiles, on plain vectors, or without a library."""
    if name == "torch":
        monkeypatch.setattr(cpu, "loaded", lambda: (None, name))
        return
    tiles = name == "cpu-amx"
    if tiles and not cpu.has_tiles():
        pytest.skip("the processor has no AMX")
    try:
        library = cpu.typed(built(SEARCH, tiles=tiles))
    except NotCompiled as fault:
        pytest.skip(str(fault))
    monkeypatch.setattr(cpu, "loaded", lambda: (library, name))


def weights(rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Weights with some large ones, and the second moment of inputs that lie together."""
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(rows, channels, generator=generator)
    weight[:, ::13] *= 3
    mixed = torch.eye(channels) + 0.1 * torch.randn(channels, channels, generator=generator)
    x = torch.randn(2 * channels, channels, generator=generator) @ mixed
    return weight, x.T @ x / len(x)


def visited(weight: Tensor, moment: Tensor, rule: GridRule, size: int) -> tuple[Tensor, Tensor]:
    """Errors and ranges after one visit."""
    error, ranges = torch.zeros_like(weight), torch.ones(weight.shape[1] // size, 4, len(weight))
    clip_visit(weight, moment, error, ranges, JOINT, SIDE, rule.bits, rule.symmetric, rule.dtype)
    return error, ranges


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("name", ["cpu-amx", "cpu-vectors"])
def test_rounding_errors_are_those_of_pytorch_to_the_bit(
    rule: GridRule, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = weights(37, 256)
    weight[3], weight[5, :128] = 0.0, 1e-30
    scales = torch.rand(5, 256) * 30 + 0.01
    for size, dtype in ((32, torch.float32), (128, torch.bfloat16), (-1, torch.float32)):
        arguments = (weight, scales, rule.bits, size, rule.symmetric, rule.dtype, 0.9, dtype)
        use(monkeypatch, "torch")
        expected = rounding_errors(*arguments)
        use(monkeypatch, name)
        assert torch.equal(rounding_errors(*arguments), expected)


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("name", ["torch", "cpu-amx", "cpu-vectors"])
def test_a_step_chooses_the_best_within_rounding(
    rule: GridRule, size: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, name)
    weight, block = weights(35, size)  # a full panel and three rows
    others = 0.05 * torch.randn(35, size)
    error, ranges = torch.full_like(weight, torch.nan), torch.ones(4, 35)
    ranges[2:] = torch.nan
    clip_step(weight, block, others, error, ranges, JOINT, SIDE, rule.bits, rule.symmetric, rule.dtype)
    judge = Judge(weight, block, others, rule, UNITS["bfloat16" if name == "cpu-amx" else "float32"])
    assert bool(judge.right(torch.ones(2, 35), ranges[:2], JOINT, SIDE).all())
    assert torch.equal(error, rule.nearest(weight, ranges[2, :, None], ranges[3, :, None]) - weight)


@pytest.mark.parametrize("fault", ["others are not seen", "H is its diagonal", "a stale block"])
@pytest.mark.parametrize("rule", RULES[:4], ids=named)
def test_a_wrong_step_is_noticed(rule: GridRule, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge must not pass a step that computes something else, in any dtype's rounding."""
    use(monkeypatch, "torch")
    weight, block = weights(100, 64)
    others = 0.5 * torch.randn(100, 64)
    stale = torch.cat([torch.zeros(8, 64), block[8:]])  # as if read before it was written
    seen = {
        "others are not seen": (block, torch.zeros_like(others)),
        "H is its diagonal": (torch.diag(block.diagonal()), others),
        "a stale block": (stale, others),
    }[fault]
    error, ranges = torch.empty_like(weight), torch.ones(4, 100)
    clip_step(weight, *seen, error, ranges, JOINT, SIDE, rule.bits, rule.symmetric, rule.dtype)
    for unit in UNITS.values():
        right = Judge(weight, block, others, rule, unit).right(torch.ones(2, 100), ranges[:2], JOINT, SIDE)
        assert int((~right).sum()) >= 5


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_every_form_loses_as_little(rule: GridRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 channels: here the products are those of bfloat16 where that is quick."""
    weight, moment = weights(300, 512)
    losses = []
    for name in ("torch", "cpu-vectors", "cpu-amx"):
        use(monkeypatch, name)
        error, _ = visited(weight, moment, rule, 128)
        losses.append(float(row_losses(error, moment).sum()))
    assert losses == pytest.approx([losses[0]] * 3, rel=2e-3)


def test_threads_do_not_matter() -> None:
    weight, moment = weights(513, 256)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append((*visited(weight, moment, RULES[0], 64), *quick_and_errors(weight, moment)))
    torch.set_num_threads(before)
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def quick_and_errors(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    errors = rounding_errors(
        weight, torch.ones(1, 256), 4, 64, False, torch.float16, 1.0, torch.bfloat16
    )[0]  # fmt: skip
    total = torch.zeros(len(weight))
    add_row_dots(errors.clone(), errors, total)
    return errors, total


@pytest.mark.parametrize("columns", [1, 16, 77, 512])
def test_row_dots(columns: int) -> None:
    left, right = (torch.randn(5, 600).bfloat16()[:, :columns] for _ in range(2))
    total = torch.ones(5)
    expected = 1 + (left.double() * right.double()).sum(dim=1)
    add_row_dots(left, right, total)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_quick_losses_are_near_the_exact_ones() -> None:
    weight, moment = weights(64, 1024)
    quick, exact = quick_row_losses(0.1 * weight, moment), row_losses(0.1 * weight, moment)
    torch.testing.assert_close(quick, exact, rtol=2e-3, atol=0)
    assert float(quick.sum()) == pytest.approx(float(exact.sum()), rel=2e-4)


def test_what_is_not_a_number_stays_so() -> None:
    """So that a job whose weights are broken is refused and not rounded."""
    weight, moment = weights(4, 128)
    weight[1, 7] = torch.nan
    errors = rounding_errors(weight, torch.ones(1, 128), 4, 32, False, torch.float16, 1.0, torch.float32)
    assert bool(errors[0, 1, 7].isnan())
    error, _ = visited(weight, moment, RULES[0], 32)
    assert bool(error[1, 7].isnan())
    assert bool(error[[0, 2, 3]].isfinite().all())


def test_no_compiler_is_logged_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fallbacks, "MET", {})
    cpu.loaded.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert search_backend(CPU) == "torch"
            assert search_backend(CPU) == "torch"
        assert len(caplog.records) == 1
        assert "no C++ compiler on PATH" in caplog.text
        assert "no C++ compiler on PATH" in fallbacks.noted()[0]
        weight, moment = weights(3, 64)
        error, _ = visited(weight, moment, RULES[0], 32)
        assert bool(error.isfinite().all())
    finally:
        cpu.loaded.cache_clear()


def test_registers_that_the_system_keeps_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Denied:
        def nibble_search_ready(self) -> int:
            return 0

    monkeypatch.setattr(fallbacks, "MET", {})
    monkeypatch.setattr(cpu, "built", lambda sources, *, tiles: Denied())
    cpu.loaded.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert search_backend(CPU) == "torch"
        assert "does not grant AMX's registers" in caplog.text
    finally:
        cpu.loaded.cache_clear()


def test_the_report_names_the_form() -> None:
    assert search_backend(CPU) in {"cpu-amx", "cpu-vectors", "torch"}
    assert search_backend(torch.device("meta")) == "torch"
