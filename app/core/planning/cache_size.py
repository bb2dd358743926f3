"""Bytes of keys and values that a served model holds per token, from the rows of its linears.

Layers without attention (Mamba, linear attention, convolutions) hold a state of fixed size per sequence,
which is not counted here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from app.core.planning.format_fit import PlannedLinear
from app.core.records.specs import Frozen

NUMBERED = re.compile(r"(?:^|\.)(\d+)\.(?:.*\.)?([^.]+)")
KEY_VALUES = {"k_proj": "k", "key": "k", "v_proj": "v", "value": "v"}
LATENT = ("kv_a_proj_with_mqa", "kv_a_proj")  # multi-head latent attention caches its output
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "qkv", "c_attn", "W_pack")  # of queries, keys and values
SLIDING = ("sliding_attention", "chunked_attention")  # in `layer_types`


class CacheShape(Frozen):
    """Values per token of all layers that keep every token, and of those that keep a window alone."""

    whole: int
    windowed: int = 0
    window: int = 0
    stateful: int = 0  # layers without keys and values

    def values(self, tokens: int) -> int:
        """Of a sequence of so many tokens."""
        return self.whole * tokens + self.windowed * min(tokens, self.window)


def cache_shape(linears: Iterable[PlannedLinear], config: Mapping[str, Any]) -> CacheShape | None:
    """Of the decoder with these linears; None if none of them says what is cached. `config`: of its text."""
    layers: dict[int, dict[str, int]] = {}
    for linear in linears:
        match = NUMBERED.search(linear.name)
        if match is None:
            continue
        values = layers.setdefault(int(match[1]), {})
        leaf = match[2]
        if leaf in KEY_VALUES:
            values[KEY_VALUES[leaf]] = linear.out_features
        elif leaf in LATENT:
            values["latent"] = linear.out_features
        elif leaf in FUSED:
            values["fused"] = fused_values(linear.out_features, config)
    sizes = {number: layer_values(values) for number, values in layers.items()}
    if not any(sizes.values()):
        return None
    kinds, window = config.get("layer_types") or (), config.get("sliding_window")
    sliding = {number for number, kind in enumerate(kinds) if kind in SLIDING and isinstance(window, int)}
    return CacheShape(
        whole=sum(size for number, size in sizes.items() if number not in sliding),
        windowed=sum(size for number, size in sizes.items() if number in sliding),
        window=window if sliding and isinstance(window, int) else 0,
        stateful=sum(not size for size in sizes.values()),
    )


def layer_values(values: Mapping[str, int]) -> int:
    """Values per token of one layer; keys stand for values too where both are the same."""
    if "latent" in values:
        return values["latent"]
    return values.get("fused", 0) + values.get("k", 0) + values.get("v", values.get("k", 0))


def fused_values(rows: int, config: Mapping[str, Any]) -> int:
    """Keys and values among the rows of one matrix for queries, keys and values."""
    heads = config.get("num_attention_heads") or config.get("n_head")
    shared = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    if not isinstance(heads, int) or not isinstance(shared, int):
        return 2 * rows // 3
    return 2 * shared * rows // (heads + 2 * shared)
