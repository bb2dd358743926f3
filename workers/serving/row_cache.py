"""Keys and values of the sequences of a batch: one row each, all ending in the same column.

A sequence of n tokens takes the last n columns of its row, as in a left-padded batch, so every decoder of
transformers can use it: new tokens of all rows go to one column, and the model makes its masks (causal,
sliding) from the plain padding mask. Rows double and columns grow in steps; a row that ends is filled by
the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from app.core.errors import ModelRefused

COLUMN_STEP = 256
States = dict[int, Tensor | None]


@dataclass
class Window:
    """The part of the buffers that is in use, shared by all layers."""

    rows: int = 0
    start: int = 0  # the first column that any row uses
    end: int = 0  # the column after the last token

    @property
    def width(self) -> int:
        return self.end - self.start


class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not checked
    """One layer's keys and values: (rows, heads, columns, head size)."""

    is_sliding = False  # all tokens are kept; the mask of a sliding layer hides the old ones

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = empty_rows(key_states), empty_rows(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_arguments: object, **_options: object
    ) -> tuple[Tensor, Tensor]:
        """Write one new token of each row behind its others; all keys and values in use."""
        rows, start, end = self.window.rows, self.window.start, self.window.end
        self.keys[:rows, :, end] = key_states[:, :, 0]
        self.values[:rows, :, end] = value_states[:, :, 0]
        return self.keys[:rows, :, start : end + 1], self.values[:rows, :, start : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.width + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.width

    def get_max_length(self) -> int:
        return -1

    def join(self, row: int, source: CacheLayerMixin | PromptLayer) -> None:
        """Keys and values of a cache of one sequence, at the end of a row."""
        keys, values = source.keys[0], source.values[0]
        columns = slice(self.window.end - keys.shape[1], self.window.end)
        self.keys[row, :, columns], self.values[row, :, columns] = keys, values

    def leave(self, row: int, last: int) -> None:
        """Drop a row; the last one takes its place."""
        if row != last:
            columns = slice(self.window.start, self.window.end)
            self.keys[row, :, columns] = self.keys[last, :, columns]
            self.values[row, :, columns] = self.values[last, :, columns]

    def release(self) -> None:
        """Free the memory of all rows."""
        self.lazy_initialization(self.keys, self.values)

    def lay_out(self, rows: int, columns: int, end: int) -> None:
        """Move what is in use into new buffers, so that its last token is before column `end`."""
        self.keys = self.moved(self.keys, rows, columns, end)
        self.values = self.moved(self.values, rows, columns, end)

    def moved(self, old: Tensor, rows: int, columns: int, end: int) -> Tensor:
        # Zeros, not garbage: a masked value is multiplied by 0, and 0 x NaN is NaN.
        new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
        used = self.window
        new[: used.rows, :, end - used.width : end] = old[: used.rows, :, used.start : used.end]
        return new


class StateRows(LinearAttentionLayer):  # type: ignore[misc]  # transformers is not checked
    """One layer's states of one size, of convolutions and recurrences, a row for each sequence."""

    def join(self, _row: int, source: LinearAttentionCacheLayerMixin) -> None:
        """Append the states of a cache of one sequence."""
        self.take_flags(source)
        for mine, theirs in zip(states_of(self), states_of(source), strict=True):
            for number in [number for number, value in theirs.items() if value is not None]:
                rows, row = mine[number], theirs[number]
                assert row is not None
                mine[number] = row[:1].clone() if rows is None else torch.cat([rows, row[:1]])

    def take_flags(self, source: LinearAttentionCacheLayerMixin) -> None:
        """All that a layer notes about its states."""
        self.dtype, self.device = source.dtype, source.device
        for field in ("conv_kernel_size", "is_conv_states_initialized", "is_recurrent_states_initialized",
                      "has_previous_state"):  # fmt: skip
            getattr(self, field).update(getattr(source, field))

    def leave(self, row: int, last: int) -> None:
        """Drop a row; the last one takes its place."""
        for states in states_of(self):
            for number, rows in states.items():
                if rows is not None:
                    rows[row] = rows[last]
                    states[number] = rows[:last].clone() if last else None

    def lay_out(self, rows: int, columns: int, end: int) -> None:
        """Nothing: these states have no columns."""

    def release(self) -> None:
        """Nothing: the last row took its memory along."""


class MixedRows(RowLayer, StateRows):
    """One layer with attention and a recurrence side by side."""

    def __init__(self, window: Window, number_of_states: int) -> None:
        StateRows.__init__(self, number_of_states)  # type: ignore[call-arg]  # transformers is not checked
        RowLayer.__init__(self, window)

    def join(self, row: int, source: LinearAttentionAndFullAttentionLayer) -> None:
        RowLayer.join(self, row, source)
        StateRows.join(self, row, source)

    def leave(self, row: int, last: int) -> None:
        RowLayer.leave(self, row, last)
        StateRows.leave(self, row, last)

    def lay_out(self, rows: int, columns: int, end: int) -> None:
        RowLayer.lay_out(self, rows, columns, end)

    def release(self) -> None:
        RowLayer.release(self)


class NoRows(DummyLayer):  # type: ignore[misc]  # transformers is not checked
    """A layer that keeps nothing: it has no attention, or reads what another layer keeps."""

    def join(self, row: int, source: DummyLayer) -> None:
        """Nothing."""

    def leave(self, row: int, last: int) -> None:
        """Nothing."""

    def lay_out(self, rows: int, columns: int, end: int) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""


def states_of(layer: LinearAttentionCacheLayerMixin) -> tuple[States, States]:
    return layer.conv_states, layer.recurrent_states


def row_layer(window: Window, source: CacheLayerMixin | PromptLayer) -> RowLayer | StateRows | NoRows:
    """Rows for what a layer of a cache of one sequence holds."""
    if isinstance(source, DummyLayer):
        return NoRows()
    if isinstance(source, LinearAttentionAndFullAttentionLayer):
        layer = MixedRows(window, source.number_of_states)
    elif isinstance(source, LinearAttentionCacheLayerMixin):
        return StateRows(source.number_of_states)
    else:
        layer = RowLayer(window)
    layer.lazy_initialization(source.keys, source.values)
    return layer


def prompt_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for one prompt: windows of sliding layers are masked, not cut, as in the rows.

    Raises ModelRefused for a model that keeps what rows can't hold.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and isinstance(layer, DynamicLayer):
            cache.layers[number] = LinearAttentionAndFullAttentionLayer(layer.number_of_states)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = DynamicLayer()
        elif type(layer) not in (DynamicLayer, LinearAttentionLayer, DummyLayer):
            raise ModelRefused(
                f"{type(model).__name__} keeps a {type(layer).__name__}, which is not served here",
                code="model_not_served", remedy="deploy the artifact with engine: vllm",
            )  # fmt: skip
    return cache


def has_states(cache: Cache) -> bool:
    """Whether any layer keeps states beside keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


class RowCache(Cache):  # type: ignore[misc]  # transformers is not checked
    """The cache that a forward pass reads and extends by one token per row."""

    def __init__(self, max_cells: int) -> None:
        self.max_cells = max_cells  # spare rows are not made beyond it
        self.window = Window()
        self.lengths: list[int] = []  # tokens of each row
        self.rows_allocated = self.columns_allocated = 0
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *arguments: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    def join(self, prefilled: Cache | PromptCache, length: int) -> None:
        """Append a row with the `length` tokens of a cache of one sequence."""
        for source in prefilled.layers[len(self.layers) :]:
            self.layers.append(self.new_layer(source))
        self.reserve(self.window.rows + 1, max(length, self.window.width))
        row = self.window.rows
        self.window.rows += 1
        self.window.start = min(self.window.start, self.window.end - length)
        self.lengths.append(length)
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.join(row, source)

    def new_layer(self, source: CacheLayerMixin | PromptLayer) -> RowLayer | StateRows | NoRows:
        """Rows for what a layer of a cache of one sequence holds."""
        return row_layer(self.window, source)

    def room(self, width: int) -> int:
        """Rows of `width` columns that fit."""
        return self.max_cells // width

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = self.window.rows - 1
        for layer in self.layers:
            layer.leave(row, last)
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.window.rows = last
        self.window.start = self.window.end - max(self.lengths, default=0)
        if last == 0:
            self.release()

    def release(self) -> None:
        """Free the memory that only a burst needed."""
        self.window.start = self.window.end = self.rows_allocated = self.columns_allocated = 0
        for layer in self.layers:
            layer.release()

    def reserve(self, rows: int, width: int) -> None:
        """Room for `rows` rows of `width` columns and one more."""
        fits = rows <= self.rows_allocated and width <= self.window.end < self.columns_allocated
        if fits:
            return
        # Tokens can be added until the next multiple of a step, and at least half a step of them.
        columns = -(-(width + COLUMN_STEP // 2) // COLUMN_STEP) * COLUMN_STEP
        doubled = 1 << (rows - 1).bit_length()
        rows = max(rows, min(doubled, self.max_cells // columns), self.window.rows)
        for layer in self.layers:
            layer.lay_out(rows, columns, width)
        self.window.start, self.window.end = width - self.window.width, width
        self.rows_allocated, self.columns_allocated = rows, columns

    def advance(self) -> None:
        """After a forward pass: every row has one token more."""
        self.window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer."""
        return [layer.keys for layer in self.layers], [layer.values for layer in self.layers]

    def mask(self, device: torch.device) -> Tensor:
        """bool (rows, columns): where a row has a token, the next one included."""
        width = self.window.width + 1
        first = torch.tensor([width - 1 - length for length in self.lengths])
        return (torch.arange(width) >= first[:, None]).to(device)

    @property
    def cells(self) -> int:
        """Tokens that the rows in use would hold if all were as long as the longest."""
        return self.window.rows * self.window.width


@dataclass
class PromptLayer:
    """One layer's keys and values of a prompt: (1, heads, tokens, head size)."""

    keys: Tensor
    values: Tensor


class PromptCache:
    """A cache of one prompt with room for all of its tokens from the start."""

    def __init__(self, shape: tuple[int, int, int, int], layers: int, dtype: torch.dtype) -> None:
        pairs = [torch.zeros(2, *shape, dtype=dtype) for _ in range(layers)]
        self.layers = [PromptLayer(keys, values) for keys, values in pairs]

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer."""
        return [layer.keys for layer in self.layers], [layer.values for layer in self.layers]


def empty_rows(states: Tensor) -> Tensor:
    return states.new_zeros(0, states.shape[1], 0, states.shape[3])
