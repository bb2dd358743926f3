"""Plans a job from headers alone: what happens to each linear.

Submission, estimate and engine call the same function, so they can't disagree. In this order below: the job,
its notes, the weights that it needs, one recipe, the scheme and the groups of each linear, the sets that
servers fuse, the formats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from app.core.errors import ModelRefused, RecipeUnsupported
from app.core.formats.file_format import ModuleSchemes, Scheme
from app.core.formats.registry import FORMATS, FormatName
from app.core.formats.targets import fused_by_name
from app.core.planning.architectures import Architecture, architecture_of
from app.core.planning.cached_attention import cache_notes, cached_modules, refuse_cache, scale_bytes
from app.core.planning.family import Family, text_settings
from app.core.planning.format_fit import (
    dense_bytes,
    linear_bytes,
    only_group_size,
    refuse_format,
    refuse_model,
)
from app.core.planning.fused_experts import split_fused_experts, unsplit_linears
from app.core.planning.linear_shapes import (
    head_shape,
    linear_shapes,
    names_of,
    recipe_shapes,
    refuse_without_head,
    takes_head,
    weight_dtype,
    with_head_step,
)
from app.core.planning.serving_advice import serving_notes
from app.core.records.specs import Frozen, GroupSize, JobSpec, Recipe, SearchSpec, matches
from app.core.sources.safetensors_header import TensorHeader

# Of an evaluation whose noise is below the loss of four bits, which are the first that people ask for.
LEAST_WINDOWS = 8
LEAST_TOKENS = 4096
# Looked up, not multiplied.
TABLES = (
    "embed_tokens", "embed_tokens_per_layer", "embed_positions", "embed_in", "embeddings", "word_embeddings",
    "wte", "wpe",
)  # fmt: skip
GROUP_SIZES: tuple[GroupSize, ...] = (128, 64, 32)
# Of config.json: to how many experts a token goes.
ROUTED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


class LinearPlan(Frozen):
    """One linear: its scheme, or None with the reason why it keeps its precision."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    reason: str | None = None
    fitted: bool = False  # the asked-for groups did not divide in_features

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


class CandidatePlan(Frozen):
    """One recipe applied to the whole model."""

    recipe_index: int
    label: str
    recipe: Recipe
    linears: tuple[LinearPlan, ...]
    head: str | None = None  # the linear that is the head, if it is quantized
    full_precision: tuple[str, ...] = ("lm_head",)  # modules that keep it, for loaders to know
    towers: tuple[str, ...] = ()  # that hold some of them, as for images
    cached: tuple[str, ...] = ()  # modules whose keys and values get scales
    fused_experts: bool = (
        False  # where none is quantized, those of a layer are one tensor, as in the original
    )
    output_bytes: dict[FormatName, int]
    bits_per_weight: float  # over the quantized linears, scales and zero points included

    @property
    def modules(self) -> ModuleSchemes:
        """The candidate as formats see it."""
        schemes = {linear.name: linear.scheme for linear in self.linears}
        return ModuleSchemes(
            schemes, self.full_precision, self.towers, self.head, self.recipe.kv_cache, self.fused_experts
        )

    @property
    def in_layers(self) -> tuple[LinearPlan, ...]:
        """The linears but the head."""
        return tuple(linear for linear in self.linears if linear.name != self.head)

    def of_layer(self, architecture: Architecture, layer: int) -> dict[str, LinearPlan]:
        """The linears of a layer, or of the head's step, by their names in it."""
        prefix = architecture.layer_prefix(layer)
        names = {prefix + name: name for name in architecture.at(layer).linears}
        return {names[linear.name]: linear for linear in self.linears if linear.name in names}


class Plan(Frozen):
    """The decisions for every candidate of a job."""

    architecture: Architecture
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int  # of attention
    routed_share: float  # of the tokens, that an expert sees on average
    parameters: int
    model_bytes: int
    layer_bytes: int  # the largest decoder layer
    dtype: str  # of the linears: float32, float16 or bfloat16
    candidates: tuple[CandidatePlan, ...]
    choices: tuple[str, ...] = ()  # what the recipes leave open, and is not the usual
    notes: tuple[str, ...] = ()  # the choices included

    @property
    def model_type(self) -> str:
        return self.architecture.model_type

    @property
    def steps(self) -> int:
        """What is solved in turn: the decoder layers, and the head if a recipe quantizes it."""
        return self.num_layers + (self.architecture.head_step is not None)


def plan_job(
    spec: JobSpec,
    config: dict[str, object],
    tensors: dict[str, TensorHeader],
    family: Family | None = None,
) -> Plan:
    """The plan of a job; `family` if it was found by tracing.

    Raises ModelRefused if the model can't be quantized at all, RecipeUnsupported if this recipe can't be
    applied to it or a requested format can't hold the outcome.
    """
    architecture = architecture_of(config, tensors, family)
    tensors = split_fused_experts(tensors, architecture.stored_layers, architecture.kinds)
    refuse_model(spec.formats, config)
    config = text_settings(config)
    num_layers = positive_integer(config, "num_hidden_layers")
    shapes = linear_shapes(architecture, num_layers, tensors)
    refuse_without_head(architecture, tensors)
    architecture = with_head_step(spec, architecture, num_layers, tensors)
    shapes |= head_shape(architecture, tensors)
    refuse_cache(spec, architecture, config)
    spec, choices = with_group_sizes(spec, architecture, shapes)
    candidates = tuple(
        plan_candidate(spec, index, architecture, shapes, tensors) for index in range(len(spec.recipes))
    )
    return Plan(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=positive_integer(config, "hidden_size"),
        vocab_size=positive_integer(config, "vocab_size"),
        num_heads=positive_integer({"num_attention_heads": 1, **config}, "num_attention_heads"),
        routed_share=routed_share(architecture, config),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        model_bytes=sum(tensor.size for tensor in tensors.values()),
        layer_bytes=largest_layer(architecture, num_layers, tensors),
        dtype=weight_dtype(shapes, tensors),
        candidates=candidates,
        choices=choices,
        notes=(
            *choices,
            *window_notes(spec, architecture, config),
            *size_notes(spec, candidates),
            *plan_notes(spec, architecture, candidates),
        ),
    )


def window_notes(spec: JobSpec, architecture: Architecture, config: dict[str, object]) -> Iterator[str]:
    """A note on windows longer than the model's maximum. RecipeUnsupported if it can't read them."""
    if spec.evaluation is None:
        return
    longest = config.get("max_position_embeddings")
    for section, length in (
        ("calibration", spec.calibration.sequence_length),
        ("evaluation", spec.evaluation.sequence_length),  # None: as calibration's
    ):
        if length is None or not isinstance(longest, int) or length <= longest:
            continue
        message = (
            f"{section} windows of {length} tokens are longer than the model's max_position_embeddings of "
            f"{longest}"
        )
        if architecture.learned_positions:
            raise RecipeUnsupported(
                message, code="sequence_too_long", remedy=f"lower {section}.sequence_length to {longest}",
                param=f"{section}.sequence_length",
            )  # fmt: skip
        yield f"{message}: perplexities say little"


def size_notes(spec: JobSpec, candidates: tuple[CandidatePlan, ...]) -> Iterator[str]:
    """Notes on texts of too few tokens."""
    if spec.evaluation is None:
        return
    windows, length = spec.evaluation.num_samples, spec.evaluation_length
    if windows < LEAST_WINDOWS or windows * length < LEAST_TOKENS:
        yield (
            f"{windows} evaluation windows of {length} tokens leave more noise than four bits cost: raise "
            f"evaluation.num_samples to {max(LEAST_WINDOWS, -(-LEAST_TOKENS // length))} or more"
        )
    tokens = spec.calibration.num_samples * spec.calibration.sequence_length
    widest = max(
        (
            linear.in_features
            for candidate in candidates
            if candidate.recipe.method != "rtn"
            for linear in candidate.linears
            if linear.scheme is not None
        ),
        default=0,
    )
    if tokens < widest:
        yield (
            f"{tokens} calibration tokens are fewer than the {widest} inputs of a linear, so part of what it "
            f"reads is unseen: raise calibration.num_samples to "
            f"{-(-widest // spec.calibration.sequence_length)} or more"
        )


def plan_notes(
    spec: JobSpec, architecture: Architecture, candidates: tuple[CandidatePlan, ...]
) -> Iterator[str]:
    """Notes for the caller that are no reason to refuse."""
    if architecture.to_find is not None:
        yield architecture.to_find
    for index, candidate in enumerate(candidates):
        recipe = candidate.recipe
        if takes_head(recipe, architecture) and architecture.kinds:
            yield f"recipe {index}: {head_note(candidate, architecture)}"
        for note in (*unmatched(candidate, architecture), *idle_options(recipe)):
            yield f"recipe {index}: {note}"
        layers = {architecture.layer_of(linear.name) for linear in candidate.in_layers}
        for note in cache_notes(candidate.cached, len(layers)):
            yield f"recipe {index}: {note}"
        fitted = [linear.reason for linear in candidate.linears if linear.fitted]
        if fitted:
            yield f"recipe {index}: {len(fitted)} linears get other groups or none, the first: {fitted[0]}"
        modules = candidate.modules
        for note in serving_notes(spec.serve_on, modules.distinct, candidate.bits_per_weight):
            yield f"recipe {index}: {note}"
        for name in spec.formats:
            for note in FORMATS[name].loader_notes(candidate.modules, architecture.model_type):
                yield f"recipe {index}: {note}"


def head_note(candidate: CandidatePlan, architecture: Architecture) -> str:
    """What becomes of a head that `ignore` does not name."""
    if candidate.head is not None:
        return f"{candidate.head} is quantized too, as `ignore` does not name it"
    return (
        f"{architecture.head} keeps its precision although `ignore` does not name it: its weights are the "
        "embedding's (tie_word_embeddings); to quantize it, save the model with a copy of them as "
        f"{architecture.head}.weight and tie_word_embeddings false"
    )


def idle_options(recipe: Recipe) -> Iterator[str]:
    """Notes on search options that were set but have no effect on this method."""
    used = set() if recipe.method == "rtn" else {"clip"}
    if recipe.searches_scales:
        used |= {"strategy", "grid_points", "duo_scaling"}
    if recipe.searches_scales and recipe.search.strategy == "evolutionary":
        used |= {"budget", "seed"}
    if recipe.method == "omniquant":
        used.add("epochs")
    for name, field in SearchSpec.model_fields.items():
        if name not in used and getattr(recipe.search, name) != field.default:
            yield f"`search.{name}` has no effect on {recipe.method} with strategy {recipe.search.strategy}"


def unmatched(candidate: CandidatePlan, architecture: Architecture) -> Iterator[str]:
    """Notes on patterns that match no linear: probably a mistake."""
    names = [name for linear in candidate.linears for name in names_of(architecture, linear.name)]
    outside = (*candidate.full_precision, architecture.head, "lm_head")
    patterns = [("ignore", pattern) for pattern in candidate.recipe.ignore]
    patterns += [("overrides", override.match) for override in candidate.recipe.overrides]
    for field, pattern in patterns:
        meant = [*names, *outside] if field == "ignore" else names
        if not any(matches(pattern, name) for name in meant):
            yield f"`{field}` names {pattern!r}, which matches no linear of the model"


def positive_integer(config: dict[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelRefused(
            f"config.json: {key} is {value!r}, expected a positive integer",
            code="config_invalid", remedy="restore the model's original config.json", param="model",
        )  # fmt: skip
    return value


def routed_share(architecture: Architecture, config: dict[str, object]) -> float:
    """Experts per token as a share of all experts; 1 without any."""
    count, chosen = architecture.num_experts, next((config[key] for key in ROUTED if key in config), None)
    return chosen / count if isinstance(chosen, int) and 0 < chosen <= count else 1.0


def largest_layer(architecture: Architecture, num_layers: int, tensors: dict[str, TensorHeader]) -> int:
    step = architecture.head_step
    sizes = dict.fromkeys(range(num_layers + (step is not None)), 0)
    for name, tensor in tensors.items():
        layer = architecture.layer_of(name)
        if layer in sizes:
            sizes[layer] += tensor.size
    return max(sizes.values())


def with_group_sizes(
    spec: JobSpec, architecture: Architecture, shapes: dict[str, tuple[int, int]]
) -> tuple[JobSpec, tuple[str, ...]]:
    """The spec with a number for every group size, and a note on each that is not the usual."""
    choices: list[str] = []
    recipes: list[Recipe] = []
    only = only_group_size(spec.formats)
    for index, recipe in enumerate(spec.recipes):
        if only is not None and recipe.group_size == "auto":
            recipe = recipe.model_copy(update={"group_size": only.size})
            choices.append(
                f"recipe {index}: group_size {only.size}, the only one of the format {only.format}"
            )
        size, obstacle = chosen_group_size(recipe, recipe_shapes(recipe, architecture, shapes))
        recipes.append(recipe.model_copy(update={"group_size": size}))
        if obstacle is not None:
            choices.append(
                f"recipe {index}: group_size {size}, the largest that divides all inputs: {obstacle}"
            )
    return spec.with_recipes(recipes), tuple(choices)


def chosen_group_size(recipe: Recipe, shapes: dict[str, tuple[int, int]]) -> tuple[GroupSize, str | None]:
    """The recipe's group size. For `auto` the largest that divides the inputs of all linears that take it,
    and what kept it from a larger one; the smallest if none does."""
    if recipe.group_size != "auto":
        return recipe.group_size, None
    largest = GROUP_SIZES[0]
    if recipe.indivisible != "refuse":
        return largest, None  # each linear gets what fits it
    inputs = {
        name: shape[1]
        for name, shape in shapes.items()
        if not any(matches(pattern, name) for pattern in recipe.ignore)
        and not any(override.group_size and override.matches(name) for override in recipe.overrides)
    }
    obstacle = next((name for name, size in inputs.items() if size % largest), None)
    if obstacle is None:
        return largest, None
    fitting = (size for size in GROUP_SIZES if all(each % size == 0 for each in inputs.values()))
    return next(fitting, GROUP_SIZES[-1]), f"{obstacle} has in_features={inputs[obstacle]}"


def plan_candidate(
    spec: JobSpec,
    index: int,
    architecture: Architecture,
    shapes: dict[str, tuple[int, int]],
    tensors: dict[str, TensorHeader],
) -> CandidatePlan:
    recipe = spec.recipes[index]
    shapes = recipe_shapes(recipe, architecture, shapes)
    linears = plan_linears(spec.recipe_field(index), recipe, architecture, shapes)
    schemes = {linear.scheme for linear in linears if linear.scheme is not None}
    for name in spec.formats:
        refuse_format(index, name, recipe, linears, schemes)
    if not schemes:
        raise RecipeUnsupported(
            "the recipe ignores every linear of the model", code="nothing_to_quantize",
            remedy="shorten `ignore`", param=f"{spec.recipe_field(index)}.ignore",
        )  # fmt: skip
    full = {linear.name for linear in linears if linear.scheme is None}
    dense = [
        tensor
        for name, tensor in tensors.items()
        if (linear := name.removesuffix(".weight")) not in shapes or linear in full
    ]
    packed = {
        name: sum(linear_bytes(name, linear, tensors[linear.name + ".weight"].dtype) for linear in linears)
        for name in spec.formats
    }
    quantized = sum(linear.parameters for linear in linears if linear.scheme)
    bits_per_weight = 8 * packed[spec.formats[0]] / quantized
    full_precision = full_precision_modules(architecture, linears, tensors)
    cached = () if recipe.kv_cache is None else cached_modules(architecture, shapes)
    return CandidatePlan(
        recipe_index=index,
        label=f"{recipe.label} mixed {bits_per_weight:.2f}" if len(schemes) > 1 else recipe.label,
        recipe=recipe,
        linears=linears,
        head=next((head for head in head_shape(architecture, tensors) if head in shapes), None),
        full_precision=full_precision,
        towers=towers(architecture, linears, full_precision),
        cached=cached,
        fused_experts=architecture.fused_experts,
        output_bytes={
            name: dense_bytes(name, dense) + size + scale_bytes(cached, tensors[f"{linears[0].name}.weight"])
            for name, size in packed.items()
        },
        bits_per_weight=bits_per_weight,
    )


def plan_linears(
    field: str, recipe: Recipe, architecture: Architecture, shapes: dict[str, tuple[int, int]]
) -> tuple[LinearPlan, ...]:
    """Every linear under the recipe, in sets that servers can fuse and with whole groups.

    `field` is where the caller wrote the recipe.
    """
    linears = tuple(
        plan_linear(recipe, names_of(architecture, name), name, shape) for name, shape in shapes.items()
    )
    refuse_split_sets(field, architecture, linears)
    refuse_head_scheme(field, architecture, linears)
    if recipe.indivisible == "refuse":
        refuse_indivisible(field, linears)
        return linears
    return fit_groups(recipe, linears, list(fused_sets(architecture, linears)))


def full_precision_modules(
    architecture: Architecture, linears: tuple[LinearPlan, ...], tensors: dict[str, TensorHeader]
) -> tuple[str, ...]:
    """The head by all of its names unless it is quantized, and every other matrix of the files: routers,
    projections beside the layers (OPT), layers beyond those of config.json (drafts of further tokens), their
    experts included."""
    head = ("lm_head", *architecture.head_modules)
    matrices = (
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight")
    )
    planned = {linear.name for linear in linears}
    if not planned.isdisjoint(head):
        head = ()
    others = [name for name in matrices if name not in planned and name.rpartition(".")[2] not in TABLES]
    ignored = (linear.name for linear in linears if linear.scheme is None)
    renamed = filter(None, map(architecture.loaded_name, (*others, *ignored)))
    return tuple(dict.fromkeys((*head, *others, *unsplit_linears(tensors), *renamed)))


def towers(
    architecture: Architecture, linears: tuple[LinearPlan, ...], full_precision: tuple[str, ...]
) -> tuple[str, ...]:
    """The modules beside the decoder that hold several linears: for images, for sound, for drafts.

    Each by its own name in the path: transformers and servers may call the model around it otherwise. Where
    transformers calls the module itself otherwise, by that name too.
    """
    around, inside = architecture.stored_layers.split("."), f"{architecture.layers}."
    # Of a model whose paths differ, a linear by itself is not found by its name.
    renamed = architecture.stored_layers != architecture.layers
    loaded = filter(None, (architecture.loaded_name(linear.name) for linear in linears))
    planned = ".".join((*(linear.name for linear in linears), *loaded))
    counts: Counter[str] = Counter()
    for name in full_precision:
        path = name.split(".")
        depth = next((n for n, (a, b) in enumerate(zip(path, around, strict=False)) if a != b), len(path))
        while depth < len(path) and path[depth] in planned:
            depth += 1  # a module that holds the decoder, too
        if not name.startswith(inside):
            counts.update(path[depth : depth + 1] if depth < len(path) - 1 or renamed else ())
    several = (name for name, count in counts.items() if count > 1 or renamed)
    return tuple(name for name in dict.fromkeys((*several, *architecture.towers)) if name not in planned)


def plan_linear(recipe: Recipe, names: tuple[str, ...], name: str, shape: tuple[int, int]) -> LinearPlan:
    """A linear under the recipe, whose patterns find it by any of `names`."""
    scheme, reason = None, None
    ignored = next(
        (pattern for pattern in recipe.ignore if any(matches(pattern, each) for each in names)), None
    )
    if ignored is not None:
        reason = f"ignored by {ignored!r}"
    else:
        scheme = recipe.scheme_of(*names)
    return LinearPlan(name=name, out_features=shape[0], in_features=shape[1], scheme=scheme, reason=reason)


def divides(group_size: int, linear: LinearPlan) -> bool:
    """Whether the linear's groups are whole."""
    return group_size == -1 or linear.in_features % group_size == 0


def misfit(linear: LinearPlan) -> str:
    assert linear.scheme is not None
    return f"in_features={linear.in_features} is not a multiple of group_size={linear.scheme.group_size}"


def refuse_indivisible(field: str, linears: tuple[LinearPlan, ...]) -> None:
    """Every group must be whole: loaders index scales by in_features // group_size."""
    for linear in linears:
        if linear.scheme is not None and not divides(linear.scheme.group_size, linear):
            fitting = [f"group_size {size}" for size in GROUP_SIZES if linear.in_features % size == 0]
            last = linear.name.split(".")[-1]
            if not linear.scheme.is_plain:
                fitting = []
            whole = "group_size -1" if linear.scheme.is_plain else "scheme fp8"
            remedy = f"use {fitting[0]}" if fitting else f"use {whole}, or add {last!r} to `ignore`"
            raise RecipeUnsupported(
                f"{linear.name}: {misfit(linear)}", code="group_size_indivisible",
                remedy=f"{remedy}, or set `indivisible` to nearest or skip",
                param=f"{field}.group_size",
            )  # fmt: skip


def fit_groups(
    recipe: Recipe, linears: tuple[LinearPlan, ...], fused: list[tuple[str, ...]]
) -> tuple[LinearPlan, ...]:
    """Give linears with an indivisible in_features the nearest smaller group size that fits, or none.

    A set that servers fuse takes the same for all of its members.
    """
    fitted = {linear.name: linear for linear in linears}
    alone = fitted.keys() - {name for names in fused for name in names}
    for names in [*fused, *((name,) for name in alone)]:
        members = [fitted[name] for name in names]
        scheme = members[0].scheme
        wrong = next((m for m in members if m.scheme and not divides(m.scheme.group_size, m)), None)
        if scheme is None or wrong is None:
            continue
        sizes = [size for size in GROUP_SIZES if size < scheme.group_size and scheme.is_plain]
        sizes *= recipe.indivisible == "nearest"
        size = next((size for size in sizes if all(divides(size, member) for member in members)), None)
        changed = None if size is None else scheme.model_copy(update={"group_size": size})
        outcome = "kept" if size is None else f"group_size {size}"
        reason = f"{outcome}: {misfit(wrong)}" + ("" if wrong.name in names[:1] else f" of {wrong.name}")
        for member in members:
            fitted[member.name] = member.model_copy(
                update={"scheme": changed, "reason": reason, "fitted": True}
            )
    return tuple(fitted[linear.name] for linear in linears)


def refuse_split_sets(field: str, architecture: Architecture, linears: tuple[LinearPlan, ...]) -> None:
    """q/k/v and gate/up become one matrix in vLLM and must share one scheme."""
    schemes = {linear.name: linear.scheme for linear in linears}
    for first, *others in fused_sets(architecture, linears):
        for other in others:
            if schemes[first] != schemes[other]:
                raise RecipeUnsupported(
                    f"{first} and {other} would get different schemes, but servers fuse them",
                    code="fused_set_split",
                    remedy=f"let `overrides` and `ignore` match all of {set_names((first, *others))}",
                    param=f"{field}.overrides",
                )


def refuse_head_scheme(field: str, architecture: Architecture, linears: tuple[LinearPlan, ...]) -> None:
    """The head is computed from integer weights alone: its inputs are rounded nowhere here."""
    step = architecture.head_step
    for linear in linears:
        if step is not None and linear.name == step.linear and linear.scheme and not linear.scheme.is_plain:
            raise RecipeUnsupported(
                f"{linear.name} would get the scheme {linear.scheme.name}; the head takes wna16 alone",
                code="head_unsupported",
                remedy=f"add {linear.name!r} to `ignore`, or give it wna16 in `overrides`",
                param=f"{field}.ignore",
            )


def set_names(names: tuple[str, ...]) -> str:
    """The names for a message: their last segments, without repetitions."""
    ends = [name.rpartition(".")[2] if len(names) > 8 else ".".join(name.split(".")[-2:]) for name in names]
    return ", ".join(dict.fromkeys(ends))


def fused_sets(architecture: Architecture, linears: tuple[LinearPlan, ...]) -> Iterator[tuple[str, ...]]:
    """The sets of linears that servers fuse, by full names."""
    if not architecture.kinds:
        yield from fused_by_name(linear.name for linear in linears)
        return
    layers = dict.fromkeys(architecture.layer_of(linear.name) for linear in linears)
    for layer in layers:
        assert layer is not None
        prefix = architecture.layer_prefix(layer)
        for names in architecture.at(layer).fused:
            yield tuple(prefix + name for name in names)


def fused_set(architecture: Architecture, name: str) -> tuple[str, tuple[str, ...]]:
    """The layer prefix of a linear and the linears of its layer that servers fuse with it."""
    layer = architecture.layer_of(name)
    assert layer is not None
    prefix = architecture.layer_prefix(layer)
    return prefix, architecture.at(layer).fused_set(name.removeprefix(prefix))
