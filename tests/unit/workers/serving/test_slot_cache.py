"""Rows of keys and values that stay where they are: joined, extended, dropped and laid out anew."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from workers.serving.slot_cache import SlotCache, SlotLimits

HEADS, SIZE, LAYERS = 2, 3, 2
LIMITS = SlotLimits(rows=10, cells=4000, longest=200, first_columns=16)
CPU = torch.device("cpu")


def prefilled(length: int, generator: torch.Generator) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys = torch.randn(1, HEADS, length, SIZE, generator=generator)
        cache.update(keys, torch.randn(1, HEADS, length, SIZE + 1, generator=generator), layer)
    return cache


Action = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 40)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("advance"), st.integers(1, 30)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(Action, max_size=14))
def test_a_row_holds_what_its_sequence_saw(actions: list[tuple[str, int]]) -> None:
    """At addresses that never change, whatever joins and leaves."""
    generator = torch.Generator().manual_seed(0)
    cache, rows = SlotCache(LIMITS, CPU), []
    addresses: set[int] = set()
    for action, number in actions:
        fits = len(rows) < LIMITS.rows and len(rows) < cache.room(max(number, cache.window.width) + 1)
        if action == "join" and fits:
            prompt = prefilled(number, generator)
            cache.join(prompt, number)
            rows.append([layer.keys[0] for layer in prompt.layers])
        elif action == "leave" and rows:
            row = number % len(rows)
            cache.leave(row)
            rows[row] = rows[-1]
            rows.pop()
        elif action == "advance" and rows:
            for _ in range(number):
                if len(rows) <= cache.room(cache.window.width + 1) and cache.window.width < LIMITS.longest:
                    rows = advance(cache, rows, generator)
        assert cache.lengths == [row[0].shape[1] for row in rows]
        addresses |= {layer.keys.data_ptr() for layer in cache.layers}
    assert len(addresses) in (0, LAYERS)


def advance(
    cache: SlotCache, rows: list[list[torch.Tensor]], generator: torch.Generator
) -> list[list[torch.Tensor]]:
    """A step of these rows and of those that fill it up; they see their own token at least."""
    cache.reserve(len(rows), cache.window.width)
    size, columns = cache.select([7] * len(rows))
    begin = cache.inputs.begin
    mask = cache.inputs.mask(begin)
    assert mask.shape == (size, columns)
    assert mask.any(-1).all()
    assert (cache.inputs.end - begin)[: len(rows)].tolist() == cache.lengths
    grown: list[list[torch.Tensor]] = [[] for _ in rows]
    for layer in range(LAYERS):
        new = torch.randn(size, HEADS, 1, SIZE, generator=generator)
        keys, values = cache.update(new, torch.randn(size, HEADS, 1, SIZE + 1, generator=generator), layer)
        assert values.isfinite().all()
        for row, old in enumerate(rows):
            grown[row].append(torch.cat([old[layer], new[row]], 1))
            assert torch.equal(keys[row][:, mask[row]], grown[row][layer])
    cache.advance()
    return grown


def test_sizes_are_few_and_hold_the_most() -> None:
    limits = SlotLimits(rows=100, cells=0, longest=5000)
    assert limits.row_sizes() == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    assert limits.column_sizes() == (512, 1024, 2048, 4096, 5120)
    assert SlotLimits(rows=3, cells=0, longest=100).row_sizes() == (1, 2, 4)
    assert SlotLimits(rows=3, cells=0, longest=100).column_sizes() == (192,)


def test_one_row_of_the_longest_text_always_fits() -> None:
    cache = SlotCache(SlotLimits(rows=4, cells=10, longest=200), CPU)
    assert cache.room(200) == 1
    cache.join(prefilled(200, torch.Generator().manual_seed(0)), 200)
    advance(cache, [[layer.keys[0, :, cache.window.start : cache.window.end] for layer in cache.layers]],
            torch.Generator().manual_seed(1))  # fmt: skip


def test_a_row_of_nothing_but_nan_reaches_no_later_one() -> None:
    cache = SlotCache(LIMITS, CPU)
    broken = DynamicCache()
    for layer in range(LAYERS):
        broken.update(
            torch.full((1, HEADS, 9, SIZE), torch.nan), torch.full((1, HEADS, 9, SIZE), torch.nan), layer
        )
    cache.join(broken, 9)
    cache.leave(0)
    generator = torch.Generator().manual_seed(0)
    prompt = DynamicCache()
    for layer in range(LAYERS):
        prompt.update(*torch.randn(2, 1, HEADS, 3, SIZE, generator=generator), layer)
    cache.join(prompt, 3)
    cache.select([1])
    keys, values = cache.update(*torch.randn(2, 1, HEADS, 1, SIZE, generator=generator), 0)
    assert keys.isfinite().all()
    assert values.isfinite().all()
