"""The linears of a model by its headers, and whether the head is one of those that a recipe quantizes."""

from __future__ import annotations

from app.core.errors import ModelRefused, RecipeUnsupported
from app.core.planning.architectures import Architecture, HeadStep
from app.core.records.specs import JobSpec, Recipe, matches
from app.core.sources.safetensors_header import TensorHeader

WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def linear_shapes(
    architecture: Architecture, num_layers: int, tensors: dict[str, TensorHeader]
) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear by full name, in the order of data."""
    shapes = {}
    for layer in range(num_layers):
        for linear in architecture.at(layer).linears:
            name = architecture.layer_prefix(layer) + linear
            tensor = tensors.get(name + ".weight")
            if tensor is None or not is_matrix(tensor):
                state = "missing" if tensor is None else f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise ModelRefused(
                    f"{name}.weight is {state}; expected a matrix of {', '.join(sorted(WEIGHT_DTYPES))}",
                    code="weights_missing" if tensor is None else "weights_unsupported",
                    remedy="check that all shards are there and that config.json belongs to them",
                    param="model",
                )
            shapes[name] = (tensor.shape[0], tensor.shape[1])
    return shapes


def refuse_without_head(architecture: Architecture, tensors: dict[str, TensorHeader]) -> None:
    """Raises ModelRefused unless the head has weights of its own or config.json gives it the embedding's."""
    if not architecture.tied and not any(name in tensors for name in architecture.head_names):
        raise ModelRefused(
            f"{' or '.join(architecture.head_names)} is missing, and config.json does not give the head the "
            f"embedding (tie_word_embeddings is false, the default of {architecture.model_type} if absent)",
            code="weights_missing",
            remedy="check that all shards are there; if the model was trained with one matrix for both, set "
            "tie_word_embeddings to true in config.json",
            param="model",
        )


def takes_head(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether `ignore` names the head by none of its names, of which `lm_head` is one in every model."""
    names = ("lm_head", *architecture.head_modules)
    return not any(matches(pattern, name) for pattern in recipe.ignore for name in names)


def with_head_step(
    spec: JobSpec, architecture: Architecture, num_layers: int, tensors: dict[str, TensorHeader]
) -> Architecture:
    """With the head behind the layers, if a recipe takes it and it has weights of its own."""
    stored = next((name for name in architecture.head_modules if f"{name}.weight" in tensors), None)
    asked = any(takes_head(recipe, architecture) for recipe in spec.recipes)
    if stored is None or architecture.tied or not asked:
        return architecture
    return architecture.model_copy(update={"head_step": HeadStep(number=num_layers, linear=stored)})


def head_shape(architecture: Architecture, tensors: dict[str, TensorHeader]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the head by its full name, if a recipe quantizes it."""
    if architecture.head_step is None:
        return {}
    name = architecture.head_step.linear
    tensor = tensors[name + ".weight"]
    if not is_matrix(tensor):
        raise RecipeUnsupported(
            f"{name}.weight is {tensor.dtype} of shape {list(tensor.shape)}; expected a matrix of "
            f"{', '.join(sorted(WEIGHT_DTYPES))}",
            code="weights_unsupported", remedy=f"add {name!r} to `ignore`", param="recipe.ignore",
        )  # fmt: skip
    return {name: (tensor.shape[0], tensor.shape[1])}


def recipe_shapes(
    recipe: Recipe, architecture: Architecture, shapes: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Without the head, where the recipe leaves it as it is."""
    step = architecture.head_step
    if step is None or takes_head(recipe, architecture):
        return shapes
    return {name: shape for name, shape in shapes.items() if name != step.linear}


def names_of(architecture: Architecture, name: str) -> tuple[str, ...]:
    """The names by which patterns of a recipe find a linear: those of the head are several."""
    step = architecture.head_step
    is_head = step is not None and name == step.linear
    return ("lm_head", *architecture.head_modules) if is_head else (name,)


def is_matrix(tensor: TensorHeader) -> bool:
    """Whether the tensor is a non-empty matrix in a dtype that can be quantized."""
    return len(tensor.shape) == 2 and 0 not in tensor.shape and tensor.dtype in WEIGHT_DTYPES


def weight_dtype(shapes: dict[str, tuple[int, int]], tensors: dict[str, TensorHeader]) -> str:
    dtypes = {tensors[name + ".weight"].dtype for name in shapes}
    if len(dtypes) > 1:
        raise ModelRefused(
            f"the linears have several dtypes: {', '.join(sorted(dtypes))}",
            code="weights_unsupported", remedy="save the model in one dtype", param="model",
        )  # fmt: skip
    return WEIGHT_DTYPES[dtypes.pop()]
