"""Moving scales between layers: the modules that absorb a group's scales, and the layer with them folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from app.core.planning.family import ScaleGroup, text_settings
from workers.modeling.layer_weights import Weights, changed, shape_of
from workers.quantization.scale_search import Fold, ScaleChoice


@dataclass(frozen=True)
class Heads:
    """How many heads config.json says that a model has, by key."""

    settings: Mapping[str, object]

    @staticmethod
    def of(config: Mapping[str, object]) -> Heads:
        return Heads(text_settings(config))

    def query(self, group: ScaleGroup) -> int:
        """Those that the group's input has."""
        count = self.settings[group.heads]
        assert isinstance(count, int)
        return count

    def key_value(self, group: ScaleGroup) -> int:
        """Those that its smooth layer gives."""
        count = self.settings.get(group.shared_heads)
        return count if isinstance(count, int) else self.query(group)


@dataclass(frozen=True)
class SmoothRows:
    """The entries of a smooth layer that take a group's scales."""

    rows: Tensor | slice
    head_shape: tuple[int, int, int] | None  # (kv heads, repeats, head_dim) where heads share scales


def smooth_rows(group: ScaleGroup, heads: Heads, rows: int, channels: int) -> SmoothRows:
    """Which of a smooth layer's `rows` feed the `channels` of the balance layers, and how often each."""
    if group.smooth_rows == "tiled":
        return SmoothRows(slice(None), (1, channels // rows, rows) if rows != channels else None)
    count, head_shape = channels, None
    if group.repeats_heads:
        head_dim = channels // heads.query(group)
        whole = group.smooth_rows == "all"
        key_value = rows // head_dim if whole else heads.key_value(group)
        if key_value != heads.query(group):
            count = key_value * head_dim
            head_shape = (key_value, heads.query(group) // key_value, head_dim)
    match group.smooth_rows:
        case "all":
            return SmoothRows(slice(None), head_shape)
        case "last":
            return SmoothRows(slice(rows - count, rows), head_shape)
        case "block":
            assert group.block is not None
            number, blocks = group.block
            size = rows // blocks
            return SmoothRows(slice(number * size, number * size + count), head_shape)
    shares = head_shape[0] if head_shape is not None else heads.query(group)
    head_dim = count // shares
    each = torch.arange(rows).view(shares, -1)
    chosen = each[:, -head_dim:] if group.smooth_rows == "last of each head" else each[:, :head_dim]
    return SmoothRows(chosen.flatten(), head_shape)


def smooth_rows_of(weights: Weights, heads: Heads, group: ScaleGroup) -> SmoothRows:
    rows = shape_of(weights, f"{group.smooth_layer}.weight")[0]
    return smooth_rows(group, heads, rows, shape_of(weights, group.balance_layers[0] + ".weight")[1])


def offset_of(group: ScaleGroup) -> float:
    """The constant that the module adds to its stored weight before it multiplies."""
    return 1.0 if group.smooth_kind == "offset norm" else 0.0


def fold_of(weights: Weights, heads: Heads, group: ScaleGroup, dtype: torch.dtype) -> Fold:
    """The module that the group's scales are folded into; dtype: of the stored weights."""
    absorbing, offset = smooth_rows_of(weights, heads, group), offset_of(group)
    smooth = weights[f"{group.smooth_layer}.weight"][absorbing.rows] + offset
    return Fold(smooth, group.smooth_kind != "linear", absorbing.head_shape, dtype, offset)


def fold_scales(
    weights: Weights, heads: Heads, groups: Sequence[ScaleGroup], choices: Sequence[ScaleChoice | None]
) -> Weights:
    """The layer's weights with every choice folded in; the function of the layer is unchanged.

    Raises KeyError for a weight that is not there.
    """
    folds: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for group, choice in zip(groups, choices, strict=True):
        if choice is None:
            continue
        for name in group.balance_layers + group.compensated:
            folds.setdefault(f"{name}.weight", []).append(partial(torch.mul, choice.scales))
        absorbing = smooth_rows_of(weights, heads, group)
        for name in (f"{group.smooth_layer}.weight", f"{group.smooth_layer}.bias"):
            if name in weights:
                added = offset_of(group) if name.endswith(".weight") else 0.0
                folds.setdefault(name, []).append(partial(divided, absorbing, choice.scales, added))

    missing = next((name for name in folds if name not in weights), None)
    if missing is not None:
        raise KeyError(missing)

    def folded(name: str, value: Tensor) -> Tensor:
        for fold in folds.get(name, ()):
            value = fold(value)
        return value

    return changed(weights, folded)


def divided_outputs(
    weights: Weights, heads: Heads, group: ScaleGroup, scales: Tensor, sizes: Tensor
) -> Tensor:
    """Sizes (n,) of the last n outputs of a group's smooth layer, once its scales are folded in."""
    rows = shape_of(weights, f"{group.smooth_layer}.weight")[0]
    factors = divided(smooth_rows_of(weights, heads, group), scales, 0.0, scales.new_ones(rows))
    return sizes * factors[rows - len(sizes) :]


def divided(absorbing: SmoothRows, scales: Tensor, added: float, value: Tensor) -> Tensor:
    """A smooth layer's weight or bias divided by the scales of the channels that it gives."""
    if absorbing.head_shape is not None:
        scales = scales.view(absorbing.head_shape)[:, 0].flatten()
    quotient = value.clone()
    divisor = scales[:, None] if value.dim() == 2 else scales
    quotient[absorbing.rows] = (quotient[absorbing.rows] + added) / divisor - added
    return quotient
