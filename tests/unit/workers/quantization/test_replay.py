"""A layer of the copy that runs again computes only what has changed, and gives the bits of a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.workers.quantization.test_paired_pass import disturbed, paired, weights_of
from workers.quantization import replay
from workers.quantization.paired_pass import PairedPass

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def counted(run: PairedPass) -> dict[str, int]:
    """How often each linear of the first layer runs, on any batch."""
    counts = dict.fromkeys(LINEARS, 0)
    for name, module in run.decoder.layers[0].named_modules():
        last = name.rpartition(".")[2]
        if last in counts:
            own = module.forward

            def forward(value: torch.Tensor, last: str = last, own=own) -> torch.Tensor:  # type: ignore[no-untyped-def]
                counts[last] += 1
                return own(value)  # type: ignore[no-any-return]

            module.forward = forward
    return counts


def solved(run: PairedPass) -> None:
    """Each stage observed, its linears changed afterwards, as if they were rounded."""
    weights, architecture = weights_of(run), run.decoder.architecture.at(0)
    own = weights
    for stage in architecture.stages:
        run.observe(stage, weights, own, [None] * len(stage))
        own = disturbed(own, *architecture.groups[stage[0]].balance_layers)
    run.advance(weights, own)


def test_each_linear_of_the_copy_runs_once(tmp_path: Path) -> None:
    run = paired(tmp_path)
    run.referenced(weights_of(run))  # the original
    counts = counted(run)
    solved(run)
    assert counts == dict.fromkeys(LINEARS, len(run.own))


@pytest.mark.parametrize("limit", [0, 20_000])
def test_without_room_for_outputs_the_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    with_room, without = paired(tmp_path / "with"), paired(tmp_path / "without")
    solved(with_room)
    monkeypatch.setattr(replay, "REPLAYED_BYTES", limit)
    counts = counted(without)
    solved(without)
    assert all(torch.equal(a, b) for a, b in zip(with_room.own, without.own, strict=True))
    assert counts["q_proj"] > len(without.own)


def test_other_weights_behind_an_output_are_noticed(tmp_path: Path) -> None:
    """Linears that were said to be final change all the same."""
    run, fresh = paired(tmp_path / "run"), paired(tmp_path / "fresh")
    weights = weights_of(run)
    run.observe((3,), weights, weights, [None])
    other = disturbed(weights, "self_attn.q_proj", "self_attn.v_proj")
    for each in (run, fresh):
        each.advance(weights, other)
    assert all(torch.equal(a, b) for a, b in zip(run.own, fresh.own, strict=True))
