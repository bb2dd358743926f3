"""What a plan asks of the formats: whether one holds the model and the recipe, and in how many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.core.errors import RecipeUnsupported
from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS, FormatName
from app.core.records.specs import GroupSize, Recipe
from app.core.sources.safetensors_header import DTYPE_BITS, TensorHeader


class PlannedLinear(Protocol):
    """A linear of a plan: its shape, and its scheme or None."""

    @property
    def name(self) -> str: ...

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def scheme(self) -> Scheme | None: ...


class OnlyGroupSize(NamedTuple):
    """A format that holds one group size alone, and that."""

    format: FormatName
    size: GroupSize


def refuse_model(formats: Sequence[FormatName], config: Mapping[str, object]) -> None:
    """Raises RecipeUnsupported if a format holds no model of this type, or not with these settings."""
    for name in formats:
        refusal = FORMATS[name].model_refusal(str(config.get("model_type")), config)
        if refusal is not None:
            raise RecipeUnsupported(
                f"the format {name} {refusal.why}", code="format_cannot_hold_model",
                remedy=f"nearest valid choice: {refusal.nearest}", param="formats",
            )  # fmt: skip


def refuse_single_files(formats: Sequence[FormatName]) -> None:
    """Raises RecipeUnsupported for formats whose one file is written layer by layer."""
    for name in formats:
        if FORMATS[name].single_file is not None:
            raise RecipeUnsupported(
                f"the format {name} is written layer by layer, and without an evaluation no layer is read",
                code="format_needs_layers", param="formats",
                remedy="ask for an evaluation, or choose the format compressed-tensors",
            )  # fmt: skip


def only_group_size(formats: Sequence[FormatName]) -> OnlyGroupSize | None:
    """Of the formats, the first that holds one group size alone."""
    sizes = ((name, FORMATS[name].group_size) for name in formats)
    return next((OnlyGroupSize(name, size) for name, size in sizes if size is not None), None)


def dense_bytes(name: FormatName, tensors: Iterable[TensorHeader]) -> int:
    """Bytes in the format of tensors that are not quantized."""
    return sum(
        math.prod(tensor.shape) * DTYPE_BITS[FORMATS[name].dense_dtype(tensor.shape, tensor.dtype)] // 8
        for tensor in tensors
    )


def linear_bytes(name: FormatName, linear: PlannedLinear, dtype: str) -> int:
    """Bytes of a linear in the format if it is quantized, bias excluded; `dtype` is that of its weight."""
    if linear.scheme is None:
        return 0
    tensors = FORMATS[name].tensors(linear.out_features, linear.in_features, linear.scheme, dtype)
    return sum(math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8 for tensor in tensors.values())


def refuse_format(
    index: int,
    name: FormatName,
    recipe: Recipe,
    linears: Iterable[PlannedLinear],
    schemes: set[Scheme],
) -> None:
    refusal = FORMATS[name].refusal(schemes)
    if refusal is not None:
        raise RecipeUnsupported(
            f"recipe {index} ({recipe.label}): the format {name} {refusal.why}",
            code="format_cannot_hold_recipe", remedy=f"nearest valid choice: {refusal.nearest}",
            param="formats",
        )  # fmt: skip
    for linear in linears:
        shape = linear.out_features, linear.in_features
        why = linear.scheme and FORMATS[name].shape_refusal(*shape, linear.scheme)
        if why:
            plain = linear.scheme is None or linear.scheme.is_plain
            other = "the format compressed-tensors" if plain else "scheme fp8"
            raise RecipeUnsupported(
                f"{linear.name}: {why}, which the format {name} needs",
                code="format_cannot_hold_recipe", remedy=f"choose {other}, or ignore this linear",
                param="formats",
            )  # fmt: skip
