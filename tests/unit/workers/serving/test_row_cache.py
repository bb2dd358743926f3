"""Rows of keys and values: joined, extended, dropped and laid out anew, against plain lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from workers.serving.row_cache import COLUMN_STEP, RowCache

HEADS, SIZE, LAYERS = 2, 3, 2


def prefilled(length: int, generator: torch.Generator) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(
            torch.randn(1, HEADS, length, SIZE, generator=generator),
            torch.randn(1, HEADS, length, SIZE + 1, generator=generator),
            layer,
        )
    return cache


Action = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 40)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("advance"), st.integers(1, COLUMN_STEP // 2)),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(Action, max_size=12))
def test_a_row_holds_what_its_sequence_saw(actions: list[tuple[str, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    cache, rows = RowCache(max_cells=10_000), []
    for action, number in actions:
        if action == "join":
            prompt = prefilled(number, generator)
            cache.join(prompt, number)
            rows.append([layer.keys[0] for layer in prompt.layers])
        elif action == "leave" and rows:
            row = number % len(rows)
            cache.leave(row)
            rows[row] = rows[-1]
            rows.pop()
        elif rows:
            for _ in range(number):
                rows = advance(cache, rows, generator)
        assert cache.lengths == [row[0].shape[1] for row in rows]
        assert cache.window.rows == len(rows)
        assert cache.window.width == max(cache.lengths, default=0)
    check(cache, rows)


def advance(
    cache: RowCache, rows: list[list[torch.Tensor]], generator: torch.Generator
) -> list[list[torch.Tensor]]:
    cache.reserve(len(rows), cache.window.width)
    grown: list[list[torch.Tensor]] = [[] for _ in rows]
    mask = cache.mask(torch.device("cpu"))
    for layer in range(LAYERS):
        new = torch.randn(len(rows), HEADS, 1, SIZE, generator=generator)
        keys, _ = cache.update(new, torch.randn(len(rows), HEADS, 1, SIZE + 1, generator=generator), layer)
        for row, old in enumerate(rows):
            grown[row].append(torch.cat([old[layer], new[row]], 1))
            assert torch.equal(keys[row][:, mask[row]], grown[row][layer])
    cache.advance()
    return grown


def check(cache: RowCache, rows: list[list[torch.Tensor]]) -> None:
    end = cache.window.end
    for row, layers in enumerate(rows):
        for layer, expected in enumerate(layers):
            found = cache.layers[layer].keys[row, :, end - expected.shape[1] : end]
            assert torch.equal(found, expected)


def test_memory_goes_back_when_nobody_is_left() -> None:
    cache = RowCache(max_cells=10_000)
    cache.join(prefilled(300, torch.Generator().manual_seed(0)), 300)
    assert cache.layers[0].keys.numel() > 0
    cache.leave(0)
    assert cache.layers[0].keys.numel() == 0
    assert cache.cells == 0
