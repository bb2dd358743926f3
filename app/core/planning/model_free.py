"""Plans a job that is not evaluated: its weights are rounded by themselves, so the model is never run.

Where the model's family is known, its definition says which tensors are linears. Of any other the names of
the tensors say it, by the rules that hold for families: matrices in numbered layers that are no router, no
table and not in a tower.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from app.core.errors import ModelRefused
from app.core.planning.architectures import OTHER_STACKS, Architecture
from app.core.planning.family import LayerKind, text_settings
from app.core.planning.family_choice import NUMBERED, is_linear
from app.core.planning.format_fit import refuse_single_files
from app.core.planning.linear_shapes import is_matrix
from app.core.planning.plan import (
    TABLES,
    CandidatePlan,
    Plan,
    plan_candidate,
    plan_job,
    plan_notes,
    with_group_sizes,
)
from app.core.records.specs import Frozen, JobSpec, matches
from app.core.sources.safetensors_header import TensorHeader

Shapes = dict[str, tuple[int, int]]
# In the last name of a matrix: it is looked up, normalizes or weighs others.
NO_LINEAR = ("embed", "norm", "bias", "position", "router", "conv")


class StreamedPlan(Frozen):
    """The decisions for every candidate of a job whose tensors are rounded one by one."""

    model_type: str
    num_layers: int
    stored_layers: str  # of whose fused experts `kinds` tell, if the family is known
    kinds: tuple[LayerKind, ...] = ()
    parameters: int
    model_bytes: int
    candidates: tuple[CandidatePlan, ...]
    choices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_model_free(
    spec: JobSpec, config: dict[str, object], tensors: dict[str, TensorHeader]
) -> StreamedPlan:
    """The plan of a job without an evaluation.

    Raises ModelRefused for a model without linears, RecipeUnsupported as `plan_job`.
    """
    refuse_single_files(spec.formats)
    try:
        plan = plan_job(spec, config, tensors)
    except ModelRefused as refusal:
        return plan_by_names(spec, config, tensors, refusal.message)
    if plan.architecture.to_find is not None:
        reason = f"the groups of {plan.model_type} are not known, and nothing needs them here"
        return plan_by_names(spec, config, tensors, reason)
    return by_definition(plan)


def by_definition(plan: Plan) -> StreamedPlan:
    return StreamedPlan(
        model_type=plan.model_type,
        num_layers=plan.num_layers,
        stored_layers=plan.architecture.stored_layers,
        kinds=plan.architecture.kinds,
        parameters=plan.parameters,
        model_bytes=plan.model_bytes,
        candidates=plan.candidates,
        choices=plan.choices,
        notes=plan.notes,
    )


def plan_by_names(
    spec: JobSpec, config: dict[str, object], tensors: dict[str, TensorHeader], reason: str
) -> StreamedPlan:
    """`reason`: why no definition decides."""
    refuse_transposed(tensors)
    shapes = named_linears(config, tensors)
    if not shapes:
        raise ModelRefused(
            f"no linear is found by its name ({reason})", code="architecture_unsupported", param="model",
            remedy="linears are matrices <list>.<number>.<name>.weight of float32, float16 or bfloat16",
        )  # fmt: skip
    architecture = nameless(config, shapes)
    spec, choices = with_group_sizes(spec, architecture, shapes)
    candidates = tuple(
        plan_candidate(spec, index, architecture, shapes, tensors) for index in range(len(spec.recipes))
    )
    return StreamedPlan(
        model_type=architecture.model_type,
        num_layers=len({layer_number(name) for name in shapes}),
        stored_layers=architecture.stored_layers,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        model_bytes=sum(tensor.size for tensor in tensors.values()),
        candidates=candidates,
        choices=choices,
        notes=(
            f"{len(shapes)} linears are chosen by their names: {reason}",
            *choices,
            *plan_notes(spec, architecture, candidates),
            *fused_notes(tensors),
            *head_notes(spec),
        ),
    )


def nameless(config: Mapping[str, object], shapes: Shapes) -> Architecture:
    """An architecture without a definition: nothing but the stack of layers with most of the weights."""
    sizes: Counter[str] = Counter()
    for name, shape in shapes.items():
        sizes[stack_of(name)] += math.prod(shape)
    stack = sizes.most_common(1)[0][0]
    return Architecture(
        model_type=str(config.get("model_type"))[:200], class_name="", layers=stack, stored_layers=stack
    )


def named_linears(config: Mapping[str, object], tensors: Mapping[str, TensorHeader]) -> Shapes:
    """(out_features, in_features) of every linear by full name, in the order of the files."""
    layers = text_settings(config).get("num_hidden_layers")
    last = layers if isinstance(layers, int) and layers > 0 else math.inf
    shapes = {}
    for tensor_name, tensor in tensors.items():
        match = NUMBERED.fullmatch(tensor_name)
        if match is None or not is_matrix(tensor) or not is_linear(match["local"], tensor):
            continue
        leaf = match["local"].rpartition(".")[2]
        looked_up = leaf in TABLES or any(word in leaf for word in NO_LINEAR) or "embed" in match["local"]
        # Layers beyond those of config.json are drafts of further tokens.
        if looked_up or OTHER_STACKS.search(match["stack"]) or int(match["number"]) >= last:
            continue
        shapes[tensor_name.removesuffix(".weight")] = (tensor.shape[0], tensor.shape[1])
    return shapes


def refuse_transposed(tensors: Mapping[str, TensorHeader]) -> None:
    """Groups lie along the inputs: of a matrix (in, out) these are its rows. Its bias tells.

    Raises ModelRefused if there is one.
    """
    for name, tensor in tensors.items():
        bias = tensors.get(name.removesuffix("weight") + "bias")
        if bias is None or not name.endswith(".weight") or len(tensor.shape) != 2 or len(bias.shape) != 1:
            continue
        rows, columns = tensor.shape
        if NUMBERED.fullmatch(name) and columns == bias.shape[0] != rows:
            raise ModelRefused(
                f"{name} has {rows} rows and a bias of {columns}: its matrices are stored transposed",
                code="architecture_unsupported", param="model",
                remedy="save the model with linears of (out_features, in_features)",
            )  # fmt: skip


def stack_of(name: str) -> str:
    match = NUMBERED.fullmatch(f"{name}.weight")
    assert match is not None
    return match["stack"]


def layer_number(name: str) -> tuple[str, str]:
    match = NUMBERED.fullmatch(f"{name}.weight")
    assert match is not None
    return match["stack"], match["number"]


def fused_notes(tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    """A note on experts in one tensor: which of its axes are rows only a definition says."""
    fused = [name for name, tensor in tensors.items() if len(tensor.shape) == 3 and "expert" in name]
    if fused:
        yield (
            f"{len(fused)} tensors of fused experts keep their precision, as names do not say how they lie; "
            f"the first: {fused[0]}"
        )


def head_notes(spec: JobSpec) -> Iterator[str]:
    for index, recipe in enumerate(spec.recipes):
        if not any(matches(pattern, "lm_head") for pattern in recipe.ignore):
            yield (
                f"recipe {index}: the head keeps its precision although `ignore` does not name it: whether "
                "its weights are its own is not known"
            )
