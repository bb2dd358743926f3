"""Rows of keys and values in memory that stays where it is, for steps that are captured once and replayed.

As in `row_cache` all rows end in one column. What differs between two steps lies in tensors (`StepInputs`);
what Python decides, how many rows and columns a step computes, comes from short lists of sizes. So a step of
given sizes reads and writes the same addresses each time, and its launches can be replayed as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from workers.serving.row_cache import (
    NoRows,
    PromptCache,
    PromptLayer,
    RowCache,
    RowLayer,
    StateRows,
    Window,
    states_of,
)
from workers.serving.sampling import uploaded

ROW_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows of a step; beyond them, multiples of the last step
ROW_STEP = 32
FIRST_COLUMNS = 512  # of the narrowest step; the next ones are twice as wide
SPARE_COLUMNS = 64  # behind the longest text: a step may run ahead of its end


@dataclass(frozen=True)
class SlotLimits:
    """The most that the memory holds."""

    rows: int
    cells: int  # rows times columns
    longest: int  # tokens of a row
    first_columns: int = FIRST_COLUMNS

    def row_sizes(self) -> tuple[int, ...]:
        """Up to the first that holds all rows."""
        sizes = [*ROW_SIZES, *range(ROW_SIZES[-1] + ROW_STEP, self.rows + ROW_STEP, ROW_STEP)]
        last = next(index for index, size in enumerate(sizes) if size >= self.rows)
        return tuple(sizes[: last + 1])

    def column_sizes(self) -> tuple[int, ...]:
        """Powers of two times the first, up to what the longest row needs."""
        widest = -(-(self.longest + SPARE_COLUMNS) // SPARE_COLUMNS) * SPARE_COLUMNS
        sizes = []
        columns = self.first_columns
        while columns < widest:
            sizes.append(columns)
            columns *= 2
        return (*sizes, widest)


class StepInputs:
    """All that differs between two steps of the same sizes; on the device, at fixed addresses."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows = self.columns = 0  # of the step that runs
        self.most_rows, self.most_columns = rows, columns
        numbers = torch.zeros(2 * rows + 1, dtype=torch.int64, device=device)
        self.tokens, self.first, self.last = numbers[:rows], numbers[rows:-1], numbers[-1:]
        self.end = self.last[0]  # the column of the new tokens
        self.ordinals = torch.arange(columns, device=device)

    def put(self, tokens: list[int], first: list[int], end: int) -> None:
        """The next step's numbers, a row each; of a token that is -1 the device has the number already."""
        spare = self.most_rows - len(tokens)
        # Rows that nobody uses begin behind the last column: `begin` lets them see their own token alone.
        numbers = [*tokens, *[0] * spare, *first, *[self.most_columns] * spare, end]
        fresh = uploaded(numbers, torch.int64, self.tokens.device)
        rows = self.most_rows
        self.tokens.copy_(torch.where(fresh[:rows] < 0, self.tokens, fresh[:rows]))
        self.first.copy_(fresh[rows:-1])
        self.last.copy_(fresh[-1:])

    @property
    def begin(self) -> Tensor:
        """int64 (rows): the first column of each row, at most that of the new token."""
        return torch.minimum(self.first[: self.rows], self.end)

    def mask(self, begin: Tensor) -> Tensor:
        """bool (rows, columns): where a row has a token, the new one included."""
        columns = self.ordinals[: self.columns]
        return (columns >= begin[:, None]) & (columns <= self.end)


class SlotLayer(RowLayer):
    """One layer's keys and values: all of its memory, seen as (rows, heads, columns, head size)."""

    is_compileable = True  # masks are then made from tensors alone

    def __init__(
        self, window: Window, inputs: StepInputs, cells: int, source: CacheLayerMixin | PromptLayer
    ) -> None:
        super().__init__(window)
        self.inputs = inputs
        self.stored = [each.new_zeros(cells, each.shape[1] * each.shape[3]) for each in pair_of(source)]
        self.heads = source.keys.shape[1]
        self.is_initialized = True
        self.see(1)

    def see(self, columns: int) -> None:
        """The same memory with so many columns."""
        self.keys, self.values = (
            each[: len(each) // columns * columns].view(-1, self.heads, columns, each.shape[1] // self.heads)
            for each in self.stored
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *_arguments: object, **_options: object
    ) -> tuple[Tensor, Tensor]:
        """Write one new token of each row of the step; all of their columns."""
        keys, values = (each[: self.inputs.rows] for each in pair_of(self))
        keys.index_copy_(2, self.inputs.last, key_states)
        values.index_copy_(2, self.inputs.last, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.inputs.columns, 0

    def get_seq_length(self) -> Tensor:  # type: ignore[override] # as transformers' static layers
        return self.inputs.end

    def join(self, row: int, source: CacheLayerMixin | PromptLayer) -> None:
        """Keys and values of a cache of one sequence, at the end of a row that is empty otherwise."""
        # What is masked is multiplied by 0, and 0 x NaN is NaN.
        self.keys[row].zero_()
        self.values[row].zero_()
        super().join(row, source)

    def lay_out(self, rows: int, columns: int, end: int) -> None:
        """See the memory with so many columns, the last token of what is in use before column `end`."""
        used = self.window
        held = [each[: used.rows, :, used.start : used.end].clone() for each in pair_of(self)]
        self.see(columns)
        for memory, states in zip(pair_of(self), held, strict=True):
            memory[: used.rows].zero_()
            memory[: used.rows, :, end - used.width : end] = states

    def release(self) -> None:
        """Nothing: the memory stays."""


class StateSlots(StateRows):
    """One layer's states of one size, a row for each sequence, in memory for the most rows."""

    def __init__(self, rows: int, number_of_states: int) -> None:
        super().__init__(number_of_states)
        self.most_rows = rows
        self.stored_states: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})

    def join(self, row: int, source: LinearAttentionCacheLayerMixin) -> None:
        """Take over the states of a cache of one sequence."""
        self.take_flags(source)
        for stored, theirs in zip(self.stored_states, states_of(source), strict=True):
            for number, value in theirs.items():
                if value is not None:
                    if number not in stored:
                        stored[number] = value.new_zeros(self.most_rows, *value.shape[1:])
                    stored[number][row] = value[0]

    def leave(self, row: int, last: int) -> None:
        """Drop a row; the last one takes its place."""
        for stored in self.stored_states:
            for rows in stored.values():
                rows[row] = rows[last]

    def select(self, rows: int) -> None:
        """Let the next step read and write so many rows."""
        for mine, stored in zip(states_of(self), self.stored_states, strict=True):
            mine.update({number: states[:rows] for number, states in stored.items()})


class MixedSlots(SlotLayer, StateSlots):
    """One layer with attention and a recurrence side by side."""

    def __init__(
        self, window: Window, inputs: StepInputs, cells: int, source: LinearAttentionAndFullAttentionLayer
    ) -> None:
        StateSlots.__init__(self, inputs.most_rows, source.number_of_states)
        SlotLayer.__init__(self, window, inputs, cells, source)

    def join(self, row: int, source: LinearAttentionAndFullAttentionLayer) -> None:
        SlotLayer.join(self, row, source)
        StateSlots.join(self, row, source)

    def leave(self, row: int, last: int) -> None:
        SlotLayer.leave(self, row, last)
        StateSlots.leave(self, row, last)

    def lay_out(self, rows: int, columns: int, end: int) -> None:
        SlotLayer.lay_out(self, rows, columns, end)

    def release(self) -> None:
        SlotLayer.release(self)


def pair_of(layer: CacheLayerMixin | PromptLayer) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


class SlotCache(RowCache):
    """A RowCache in memory of a fixed size."""

    def __init__(self, limits: SlotLimits, device: torch.device) -> None:
        self.row_sizes, self.column_sizes = limits.row_sizes(), limits.column_sizes()
        super().__init__(max(limits.cells, self.column_sizes[-1]))
        self.inputs = StepInputs(self.row_sizes[-1], self.column_sizes[-1], device)
        self.changed = True  # beyond one token more in each row, since the inputs were put

    def new_layer(self, source: CacheLayerMixin | PromptLayer) -> RowLayer | StateRows | NoRows:
        if isinstance(source, DummyLayer):
            return NoRows()
        if isinstance(source, LinearAttentionAndFullAttentionLayer):
            return MixedSlots(self.window, self.inputs, self.max_cells, source)
        if isinstance(source, LinearAttentionCacheLayerMixin):
            return StateSlots(self.inputs.most_rows, source.number_of_states)
        return SlotLayer(self.window, self.inputs, self.max_cells, source)

    def columns_for(self, width: int) -> int:
        """The narrowest size with room for some tokens more."""
        columns = width + width // 8 + 1
        return next((each for each in self.column_sizes if each >= columns), self.column_sizes[-1])

    def rows_for(self, rows: int) -> int:
        return next(each for each in self.row_sizes if each >= rows)

    def room(self, width: int) -> int:
        """Rows of `width` columns that fit: those of the largest step that does."""
        columns = self.columns_for(width)
        return max(each for each in self.row_sizes if each * columns <= self.max_cells)

    def reserve(self, rows: int, width: int) -> None:
        """Room for a step of `rows` rows of `width` columns and one more."""
        columns, needed = self.columns_allocated, self.columns_for(width)
        fits = self.rows_for(rows) * columns <= self.max_cells
        if fits and width <= self.window.end < columns and columns < 4 * needed:
            return
        for layer in self.layers:
            layer.lay_out(rows, needed, width)
        self.window.start, self.window.end = width - self.window.width, width
        self.columns_allocated, self.changed = needed, True

    def join(self, prefilled: Cache | PromptCache, length: int) -> None:
        super().join(prefilled, length)
        self.changed = True

    def leave(self, row: int) -> None:
        self.inputs.tokens[row] = self.inputs.tokens[self.window.rows - 1]
        super().leave(row)
        self.changed = True

    def release(self) -> None:
        """The memory stays; the next prompt lays it out anew."""
        self.window.start = self.window.end = self.columns_allocated = 0

    def select(self, tokens: list[int]) -> tuple[int, int]:
        """The sizes of the next step, whose inputs get these tokens: -1 where the device has it already."""
        inputs = self.inputs
        inputs.rows, inputs.columns = self.rows_for(len(tokens)), self.columns_allocated
        for layer in self.layers:
            if isinstance(layer, StateSlots):
                layer.select(inputs.rows)
        if self.changed or max(tokens) >= 0:
            end = self.window.end
            inputs.put(tokens, [end - length for length in self.lengths], end)
            self.changed = False
        return inputs.rows, inputs.columns

    def advance(self) -> None:
        super().advance()
        self.inputs.last.add_(1)

    def static_tensors(self) -> list[Tensor]:
        """All that a step may read or write beside the model's weights."""
        held = [
            self.inputs.tokens,
            self.inputs.first,
            self.inputs.last,
            self.inputs.end,
            self.inputs.ordinals,
        ]
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                held += pair_of(layer)
            if isinstance(layer, StateSlots):
                held += [each for states in states_of(layer) for each in states.values() if each is not None]
        return held

    @contextmanager
    def states_put_back(self) -> Iterator[None]:
        """Recurrent states after a step that is run twice. Keys and values come out the same."""
        stored = [
            each
            for layer in self.layers
            if isinstance(layer, StateSlots)
            for states in layer.stored_states
            for each in states.values()
        ]
        before = [each.clone() for each in stored]
        try:
            yield
        finally:
            for states, old in zip(stored, before, strict=True):
                states.copy_(old)
