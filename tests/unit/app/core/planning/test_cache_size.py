"""Bytes of keys and values per token, from the rows of linears."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.planning.cache_size import CacheShape, cache_shape
from app.core.planning.plan import LinearPlan


def shape_of(
    rows: dict[str, int], config: dict[str, Any] | None = None, layers: int = 4
) -> CacheShape | None:
    linears = [
        LinearPlan(name=f"model.layers.{layer}.{name}", out_features=size, in_features=8, scheme=None)
        for layer in range(layers)
        for name, size in rows.items()
    ]
    return cache_shape(linears, config or {})


@pytest.mark.parametrize(
    ("rows", "config", "of_a_layer"),
    [
        ({"self_attn.q_proj": 64, "self_attn.k_proj": 16, "self_attn.v_proj": 24}, {}, 40),
        ({"self_attn.q_proj": 64, "self_attn.k_proj": 16}, {}, 32),  # keys are values
        ({"self_attn.kv_a_proj_with_mqa": 576, "self_attn.kv_b_proj": 4096}, {}, 576),
        ({"self_attn.qkv_proj": 96}, {"num_attention_heads": 4, "num_key_value_heads": 1}, 32),
        ({"attention.query_key_value": 96}, {"num_attention_heads": 4}, 64),
    ],
)
def test_what_a_layer_caches(rows: dict[str, int], config: dict[str, Any], of_a_layer: int) -> None:
    shape = shape_of({**rows, "mlp.up_proj": 128}, config)
    assert shape == CacheShape(whole=4 * of_a_layer)
    assert shape.values(100) == 400 * of_a_layer


def test_windows_hold_no_more_than_their_tokens() -> None:
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = {"layer_types": kinds, "sliding_window": 10}
    shape = shape_of({"self_attn.k_proj": 5, "self_attn.v_proj": 5}, config)
    assert shape == CacheShape(whole=10, windowed=30, window=10)
    assert (shape.values(4), shape.values(100)) == (160, 1000 + 300)


def test_layers_without_attention_are_counted() -> None:
    linears = [
        LinearPlan(name="model.layers.0.mixer.in_proj", out_features=8, in_features=8, scheme=None),
        LinearPlan(name="model.layers.1.self_attn.k_proj", out_features=8, in_features=8, scheme=None),
    ]
    assert cache_shape(linears, {}) == CacheShape(whole=16, stateful=1)
    assert cache_shape(linears[:1], {}) is None
