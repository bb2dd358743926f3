"""Moving scales between layers: the modules that absorb a group's scales, and the layer with them folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.core.planning.architectures import ScaleGroup
from workers.quantization.scale_search import Fold, ScaleChoice


@dataclass(frozen=True)
class Heads:
    """Attention heads of the model."""

    query: int
    key_value: int

    @staticmethod
    def of(config: dict[str, object]) -> Heads:
        query = config["num_attention_heads"]
        assert isinstance(query, int)
        key_value = config.get("num_key_value_heads")
        return Heads(query, key_value if isinstance(key_value, int) else query)


@dataclass(frozen=True)
class SmoothRows:
    """The entries of a smooth layer that take a group's scales."""

    rows: Tensor | slice
    head_shape: tuple[int, int, int] | None  # (kv heads, repeats, head_dim) where heads share scales


def smooth_rows(group: ScaleGroup, heads: Heads, rows: int, channels: int) -> SmoothRows:
    """Which of a smooth layer's `rows` feed the `channels` of the balance layers, and how often each."""
    head_dim = channels // heads.query
    count, head_shape = channels, None
    key_value = rows // head_dim if group.smooth_rows == "all" else heads.key_value
    if group.repeats_heads and key_value != heads.query:
        count = key_value * head_dim
        head_shape = (key_value, heads.query // key_value, head_dim)
    if group.smooth_rows == "all":
        return SmoothRows(slice(None), head_shape)
    if group.smooth_rows == "last":
        return SmoothRows(slice(rows - count, rows), head_shape)
    return SmoothRows(torch.arange(rows).view(heads.query, -1)[:, -head_dim:].flatten(), head_shape)


def smooth_rows_of(weights: dict[str, Tensor], heads: Heads, group: ScaleGroup) -> SmoothRows:
    smooth = weights[f"{group.smooth_layer}.weight"]
    return smooth_rows(group, heads, smooth.shape[0], weights[group.balance_layers[0] + ".weight"].shape[1])


def offset_of(group: ScaleGroup) -> float:
    """The constant that the module adds to its stored weight before it multiplies."""
    return 1.0 if group.smooth_kind == "offset norm" else 0.0


def fold_of(weights: dict[str, Tensor], heads: Heads, group: ScaleGroup, dtype: torch.dtype) -> Fold:
    """The module that the group's scales are folded into; dtype: of the stored weights."""
    absorbing, offset = smooth_rows_of(weights, heads, group), offset_of(group)
    smooth = weights[f"{group.smooth_layer}.weight"][absorbing.rows] + offset
    return Fold(smooth, group.smooth_kind != "linear", absorbing.head_shape, dtype, offset)


def fold_scales(
    weights: dict[str, Tensor], heads: Heads, groups: Sequence[ScaleGroup], choices: list[ScaleChoice | None]
) -> dict[str, Tensor]:
    """The layer's weights with every choice folded in; the function of the layer is unchanged."""
    folded = dict(weights)
    for group, choice in zip(groups, choices, strict=True):
        if choice is None:
            continue
        absorbing, offset = smooth_rows_of(weights, heads, group), offset_of(group)
        shared = choice.scales
        if absorbing.head_shape is not None:
            shared = shared.view(absorbing.head_shape)[:, 0].flatten()
        for name in group.balance_layers + group.compensated:
            folded[name + ".weight"] = folded[name + ".weight"] * choice.scales
        for name in (f"{group.smooth_layer}.weight", f"{group.smooth_layer}.bias"):
            if name in folded:
                value = folded[name].clone()
                added = offset if name.endswith(".weight") else 0.0
                divisor = shared[:, None] if value.dim() == 2 else shared
                value[absorbing.rows] = (value[absorbing.rows] + added) / divisor - added
                folded[name] = value
    return folded
