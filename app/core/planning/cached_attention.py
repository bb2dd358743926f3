"""Which layers keep keys and values of every token, and where the scales of a cache of them stand in files.

vLLM (`get_cache_scale_mapper`, 0.32) and compressed-tensors (`is_cached_attention_module`, 0.20) look for
`k_scale` and `v_scale` in the module whose linears give the keys and values. Where the names of a layer's
linears leave open what its cache holds, no scales are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from app.core.errors import RecipeUnsupported
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.architectures import Architecture
from app.core.planning.family import LayerKind
from app.core.records.specs import JobSpec, Recipe
from app.core.sources.safetensors_header import DTYPE_BITS, TensorHeader

CACHE_SCALES = ("k_scale", "v_scale")
ATTENTION = "self_attn"
KEY, VALUE, JOINED = (f"{ATTENTION}.{name}" for name in ("k_proj", "v_proj", "qkv_proj"))
VALUES = (VALUE, JOINED)  # the last rows of one of these give the values
RECURRENT = re.compile(r"(^|\.)(linear_attn|mamba|conv)\.", re.ASCII)
LATENT = re.compile(r"(^|\.)w?kv_[ab](_|$)", re.ASCII)
# Last names of linears that keys or values may come from.
GIVES_KEYS = re.compile(r"attn|qkv|(^|_)(k|v|kv|key|value)(_|$)", re.ASCII)


def value_linear(kind: LayerKind) -> str | None:
    """The linear whose last rows give the values of a layer that caches them; None if it has none."""
    names = attention_linears(kind)
    return next((name for name in VALUES if name in names), None)


def attention_module(architecture: Architecture, layer: int) -> str | None:
    """The module of transformers in a layer that hands keys and values to a cache; None if it has none."""
    linear = None if architecture.is_head(layer) else value_linear(architecture.kind(layer))
    return None if linear is None else architecture.module_name(linear).rpartition(".")[0]


def attention_linears(kind: LayerKind) -> set[str]:
    """The linears of a layer that keys or values may come from, those of recurrences left out."""
    return {
        name
        for name in linears_of(kind)
        if not RECURRENT.search(name) and "expert" not in name and GIVES_KEYS.search(name.rpartition(".")[2])
    }


def linears_of(kind: LayerKind) -> set[str]:
    return {name for group in kind.groups for name in group.balance_layers + group.compensated}


def cached_modules(architecture: Architecture, linears: Iterable[str]) -> tuple[str, ...]:
    """The attention of each layer that has one, by full names in checkpoints, as the linears are."""
    modules = []
    for name in linears:
        layer = architecture.layer_of(name)
        if layer is not None and not architecture.is_head(layer):
            prefix = architecture.layer_prefix(layer)
            if name.removeprefix(prefix) == value_linear(architecture.kind(layer)):
                modules.append(prefix + ATTENTION)
    return tuple(modules)


def refuse_cache(spec: JobSpec, architecture: Architecture, settings: Mapping[str, object]) -> None:
    """Raises RecipeUnsupported for scales of a cache that a format can't hold or the model has no place for.

    `settings`: of config.json. A model whose groups are yet to be found is looked at when they are.
    """
    for index, recipe in enumerate(spec.recipes):
        if recipe.kv_cache is None:
            continue
        for name in spec.formats:
            refuse_cache_in(index, name, recipe)
        why = None if architecture.to_find is not None else obstacle(architecture, settings)
        if why is not None:
            raise RecipeUnsupported(
                f"kv_cache {recipe.kv_cache}: {why}", code="kv_cache_unsupported",
                remedy="leave `kv_cache` out", param=f"{spec.recipe_field(index)}.kv_cache",
            )  # fmt: skip


def refuse_cache_in(index: int, name: FormatName, recipe: Recipe) -> None:
    if not FORMATS[name].holds_cache_scales:
        raise RecipeUnsupported(
            f"recipe {index} ({recipe.label}): the format {name} holds no scales of a cache",
            code="format_cannot_hold_recipe", param="formats",
            remedy="nearest valid choice: the format compressed-tensors, or `kv_cache` left out",
        )  # fmt: skip


def obstacle(architecture: Architecture, settings: Mapping[str, object]) -> str | None:
    """Why it is not clear what the model's cache holds, or None."""
    model = architecture.model_type
    own = dict.fromkeys(architecture.layer_kinds) or range(len(architecture.kinds))
    kinds = [architecture.kinds[number] for number in own]
    shared = settings.get("num_kv_shared_layers")
    if isinstance(shared, int) and shared > 0:
        return f"{shared} layers of {model} read keys and values of other layers"
    linears = [attention_linears(kind) for kind in kinds]
    if not any(linears):
        return f"no layer of {model} is known to keep keys and values of every token"
    for kind, names in zip(kinds, linears, strict=True):
        if not names and any(name.startswith(f"{ATTENTION}.") for name in linears_of(kind)):
            return f"some layers of {model} attend to keys and values of other layers"
        latent = next((name for name in sorted(names) if LATENT.search(name)), None)
        if latent is not None:
            return f"{model} caches a latent in place of keys and values ({latent})"
        apart = {KEY, VALUE} <= names and names <= {KEY, VALUE}
        joined = names == {JOINED} and all(each == names for each in linears)
        if names and not (apart or joined):
            return f"what {model} caches is not clear from {', '.join(sorted(names))}"
    return None


def scale_bytes(modules: tuple[str, ...], weight: TensorHeader) -> int:
    """Bytes of the scales of these modules, in the dtype of a weight."""
    return len(modules) * len(CACHE_SCALES) * DTYPE_BITS[weight.dtype] // 8


def cache_notes(modules: tuple[str, ...], num_layers: int) -> Iterator[str]:
    """A note on layers that keep no keys and values, where others do."""
    others = num_layers - len(modules)
    if modules and others:
        yield (
            f"{others} of {num_layers} layers keep a state of one size in place of keys and values: they get "
            "no scales of the cache"
        )
