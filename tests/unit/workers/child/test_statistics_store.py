"""Statistics come back bit by bit, and what is broken or of other work is missing."""

from __future__ import annotations

from pathlib import Path

import torch

from workers.child.statistics_store import LayerStatistics, StatisticsStore
from workers.quantization.input_statistics import InputStatistics


def statistics(seed: int = 0) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    groups = [
        InputStatistics(
            torch.rand(size, generator=generator), torch.rand(size, size, generator=generator), 7, routed
        )
        for size, routed in ((4, None), (6, 3))
    ]
    return LayerStatistics(groups, (torch.rand(1, 3, 4, generator=generator), torch.rand(1, 3, 4)))


def test_statistics_come_back(tmp_path: Path) -> None:
    saved = statistics()
    StatisticsStore(tmp_path / "statistics", "mine").save(2, saved)
    loaded = StatisticsStore(tmp_path / "statistics", "mine").load(2)
    for mine, theirs in zip(loaded.groups, saved.groups, strict=True):
        assert torch.equal(mine.abs_mean, theirs.abs_mean)
        assert torch.equal(mine.second_moment, theirs.second_moment)
        assert (mine.num_tokens, mine.routed_tokens) == (theirs.num_tokens, theirs.routed_tokens)
    assert all(torch.equal(*pair) for pair in zip(loaded.probe, saved.probe, strict=True))


def test_what_is_absent_cut_or_foreign_is_missing(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path, "mine")
    assert store.missing(4) == [0, 1, 2, 3]
    for layer in range(3):
        store.save(layer, statistics(layer))
    assert store.missing(4) == [3]
    path = store.path(1)
    path.write_bytes(path.read_bytes()[:-40])
    assert store.missing(4) == [1, 3]
    assert StatisticsStore(tmp_path, "other").missing(4) == [0, 1, 2, 3]
    assert not list(tmp_path.glob("*.partial"))
