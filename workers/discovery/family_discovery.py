"""The record of a model family, found by tracing a tiny model of transformers' class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.core.errors import ModelRefused
from app.core.planning.family import LAYER_OUTPUT, Family, LayerKind, ScaleGroup
from workers.discovery.family_settings import settings_of
from workers.discovery.joins import joined
from workers.discovery.layer_tracing import (
    TracedLayer,
    called_modules,
    find_layers,
    hooked,
    logits_of,
    some_ids,
    traced_layers,
)
from workers.discovery.random_weights import classes_of, refused, signature, tiny_model
from workers.discovery.shrunk_config import POSITIONS, whole_config
from workers.discovery.smooth_layers import UNSCALED, LayerProbe, is_linear, layer_groups
from workers.discovery.stored_names import StoredLayer, StoredModel, prefix_pairs, renamed
from workers.modeling.experts import split_experts

# Settings that give a family layers with other linears, where its default has none of them.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "mlp_only_layers": ([0],),
    "first_k_dense_replace": (1,),
    "q_lora_rank": (None, 64),
    "word_embed_proj_dim": (64,),
    "interleave_moe_layer_step": (2,),
    "attn_layer_indices": ([1, 3],),
}
NO_INPUTS = {"hidden_size_per_layer_input": 0}
GEMMA_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128}
VARIANTS_OF_TYPE: dict[str, tuple[dict[str, Any], ...]] = {
    "gemma4_text": (
        NO_INPUTS,
        {**NO_INPUTS, "attention_k_eq_v": True},
        {**NO_INPUTS, **GEMMA_EXPERTS},
        {**NO_INPUTS, **GEMMA_EXPERTS, "attention_k_eq_v": True},
    ),
    "granitemoehybrid": ({"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2},),
    "lfm2": ({"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},),
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Of matrices this small, threads that wait for each other take more processor time than the products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
@torch.no_grad()
def discover(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, under its settings.

    Raises ModelRefused if it can't be quantized, with the reason.
    """
    try:
        return traced_family(config)
    except ModelRefused:
        raise
    except Exception as fault:  # a model is code of transformers, which raises what it likes
        raise refused(f"tracing its layers fails: {one_line(fault)}") from fault


def one_line(fault: Exception | None) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"


def traced_family(config: Mapping[str, Any]) -> Family:
    model, attention = working_model(config)
    layers = traced_layers(model, find_layers(model))
    stored = StoredModel(model)
    outside = outside_modules(model, layers)
    towers = stored.towers(called_modules(model))
    kinds, pairs = layer_kinds(model, layers, stored)
    whole = whole_config(config)
    return Family.model_validate(
        {
            "model_type": config["model_type"],
            "class_name": type(model).__name__,
            **outside,
            "attention": attention,
            "tied": bool(getattr(whole, "tie_word_embeddings", False)),
            "stored_names": pairs,
            "towers": towers,
            "settings": settings_of(whole),
            "kinds": kinds,
        }
    )


def discover_type(model_type: str) -> Family:
    """The family under its default settings, with the kinds of layers that common others give it too."""
    default = {"model_type": model_type}
    family = discover(default)
    text = whole_config(default).get_text_config()
    kinds = {frozenset(kind.linears): kind for kind in family.kinds}
    final = family.final
    for changes in variants(text):
        inner = {"text_config": changes} if text.model_type != model_type else changes
        with suppress(ModelRefused):
            other = discover({**default, **inner})
            final = max(final, other.final, key=len)
            for kind in other.kinds:
                kinds.setdefault(frozenset(kind.linears), kind)
    return family.model_copy(update={"kinds": tuple(kinds.values()), "final": final})


def variants(text: PretrainedConfig) -> list[dict[str, Any]]:
    """Combinations of other values for the settings that decide which linears a layer has."""
    combined: list[dict[str, Any]] = [{}]
    for key, values in VARIANTS.items():
        default = getattr(text, key, ...)
        others = [
            v
            for v in values
            if default is not ... and v != default and (v is None or default is None or key != "q_lora_rank")
        ]
        combined += [{**each, key: value} for each in combined for value in others]
    return [*combined[1:], *VARIANTS_OF_TYPE.get(text.model_type, ())]


def working_model(config: Mapping[str, Any]) -> tuple[PreTrainedModel, str]:
    """The tiny model, with grouped heads where its class can have them, and its form of attention.

    Raises ModelRefused if its forward pass fails, is not repeatable, or looks ahead.
    """
    fault: Exception | None = None
    for chosen, grouped in product(classes_of(config), (True, False)):
        try:
            model = tiny_model(config, grouped=grouped, chosen=chosen)
            attention = attention_of(model)
            logits = logits_of(model, some_ids())
        except ModelRefused:
            raise
        except Exception as error:  # noqa: BLE001  # a model is code of transformers, which raises what it likes
            fault = fault or error
        else:
            check_logits(model, logits)
            return model, attention
    raise refused(f"its tiny model does not run: {one_line(fault)}") from fault


def check_logits(model: PreTrainedModel, logits: Tensor) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise refused("it has an encoder and a decoder: it is no causal language model")
    if not torch.isfinite(logits).all() or not near(logits_of(model, some_ids()), logits):
        raise refused("its forward pass is not repeatable: it keeps state, or draws random numbers")
    other = some_ids().clone()
    other[0, -1] += 1
    if not near(logits_of(model, other)[:, :-1], logits[:, :-1]):
        raise refused("a token's output depends on later tokens: it is no causal language model")


def near(values: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((values - expected).norm() <= tolerance * expected.norm())


def layer_kinds(
    model: PreTrainedModel, layers: Sequence[TracedLayer], stored: StoredModel
) -> tuple[tuple[LayerKind, ...], tuple[tuple[str, str], ...]]:
    """Every kind of layer in checkpoints' names, and the prefixes of names within and outside of layers."""
    first: dict[object, TracedLayer] = {}
    for layer in layers:
        first.setdefault(signature(layer.module), layer)
    local: dict[str, str] = {}
    prepared: list[tuple[TracedLayer, StoredLayer]] = []
    for layer in first.values():
        inside = stored.layer(layer.path, layer.module)
        local |= inside.names
        prepared.append((layer, inside))
    pairs = dict(prefix_pairs(local))
    config = model.config.to_dict()
    kinds: dict[frozenset[str], LayerKind] = {}
    for layer, inside in prepared:
        kind = layer_kind(layer, inside, config, pairs)
        same = kinds.get(frozenset(kind.linears))
        kinds[frozenset(kind.linears)] = kind if same is None else agreed(same, kind)
    path = layers[0].path.rpartition(".")[0]
    outside = stored.outside(path, prepared[0][1].prefix, called_modules(model))
    return tuple(kinds.values()), (*prefix_pairs(local), *prefix_pairs(outside))


def layer_kind(
    layer: TracedLayer, inside: StoredLayer, config: Mapping[str, object], pairs: Mapping[str, str]
) -> LayerKind:
    """The groups of one layer, proven together."""
    if inside.experts is not None:
        split_experts(layer.module, inside.experts)
    probe = LayerProbe(layer.module, layer.call, config)
    if not probe.repeatable:
        raise refused("a layer is not repeatable: it keeps state, or draws random numbers")
    check_stored(probe, inside)
    groups = tuple(joined(probe, group) for group in layer_groups(probe))
    if not probe.holds([group for group in groups if group.smooth_layer is not None]):
        raise refused("the scales of its groups change what a layer computes when all are folded in")
    if not groups:
        transposed = any(isinstance(module, Conv1D) for module in probe.modules.values())
        raise refused(
            "a layer has no linears" + (": its matrices are stored transposed" if transposed else "")
        )
    groups = tuple(in_files(group, pairs) for group in groups)
    return LayerKind(groups=groups, experts=inside.experts, joined=inside.joined)


def check_stored(probe: LayerProbe, inside: StoredLayer) -> None:
    """Raises ModelRefused if checkpoints hold a linear in another form, or matrices are no linears."""
    for name in probe.trace.order:
        within = probe.block is not None and name.startswith(probe.block.path + ".")
        if is_linear(probe.modules[name]) and not within and f"{name}.weight" not in inside.names:
            raise refused(f"checkpoints do not store {name} as a matrix of its own")
    for name, value in probe.weights.items():
        if value.dim() == 3 and value.shape[0] > 1 and min(value.shape[1:]) >= 16:
            raise refused(f"its experts ({name}) have a form that can't be taken apart")


def in_files(group: ScaleGroup, pairs: Mapping[str, str]) -> ScaleGroup:
    """The group under the names of checkpoints."""

    def each(name: str | None) -> str | None:
        if name is None or name == LAYER_OUTPUT:
            return name
        return renamed(name + ".weight", pairs).removesuffix(".weight")

    return group.model_copy(
        update={
            "balance_layers": tuple(each(name) for name in group.balance_layers),
            "compensated": tuple(each(name) for name in group.compensated),
            **{key: each(getattr(group, key)) for key in ("smooth_layer", "observed", "expert", "joins")},
        }
    )


def agreed(one: LayerKind, other: LayerKind) -> LayerKind:
    """What holds for two kinds of layers with the same linears: scales that only one allows are dropped."""
    if one.groups == other.groups:
        return one
    groups = []
    by_layers = {group.balance_layers: group for group in other.groups}
    for group in one.groups:
        twin = by_layers.get(group.balance_layers)
        if twin is None:
            raise refused("layers with the same linears share other inputs")
        joins = group.joins if group.joins == twin.joins else None
        if group.model_copy(update={"joins": None}) == twin.model_copy(update={"joins": None}):
            groups.append(group.model_copy(update={"joins": joins}))
        else:
            plain = ScaleGroup(balance_layers=group.balance_layers, unscaled=UNSCALED, joins=joins)
            groups.append(plain.model_copy(update={"observed": group.observed, "expert": group.expert}))
    return one.model_copy(update={"groups": tuple(groups)})


def outside_modules(model: PreTrainedModel, layers: Sequence[TracedLayer]) -> dict[str, Any]:
    """The fields of a Family for what lies before and after its layers."""
    path = layers[0].path.rpartition(".")[0]
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = (
        names.get(id(m)) for m in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head is None or embedding is None:
        raise refused("its class does not name its embedding or its head")
    parent = head.rpartition(".")[0]
    below = path.removeprefix(parent + ".") if parent else path
    trunk = ".".join(filter(None, (parent, below.split(".")[0])))
    return {
        "layers": path,
        "embedding": embedding,
        "final": after_layers(model, layers[-1], head),
        "head": head,
        "trunk": trunk,
        "learned_positions": positions_end(model),
    }


def after_layers(model: PreTrainedModel, last: TracedLayer, head: str) -> tuple[str, ...]:
    """Modules that are called after the last layer and before the head."""
    called: list[str] = []
    events: list[str] = []
    handles: list[Any] = [last.module.register_forward_hook(lambda *_: events.append("layers"))]
    for name, module in model.named_modules():

        def before(_: nn.Module, args: Any, name: str = name) -> None:
            if name == head:
                events.append("head")
            elif events == ["layers"] and not any(name.startswith(outer + ".") for outer in called):
                called.append(name)

        handles.append(module.register_forward_pre_hook(before))
    with hooked(handles):
        logits_of(model, some_ids())
    if "head" not in events:
        raise refused("its forward pass does not call its head")
    return tuple(called)


def attention_of(model: PreTrainedModel) -> str:
    """`sdpa` if the class has it and it computes the same as the plain form."""
    if not getattr(model, "_supports_sdpa", False):
        return "eager"
    fast = logits_of(model, some_ids())
    model.set_attn_implementation("eager")
    plain = logits_of(model, some_ids())
    model.set_attn_implementation("sdpa")
    return "sdpa" if near(fast, plain, 1e-5) else "eager"


def positions_end(model: PreTrainedModel) -> bool:
    """Whether longer texts than the config's positions fail: positions come from a table."""
    text = model.config.get_text_config()
    if getattr(text, "max_position_embeddings", None) != POSITIONS:
        return False
    try:
        logits_of(model, some_ids(tokens=POSITIONS + 8))
    except (IndexError, RuntimeError, ValueError):
        return True
    return False
