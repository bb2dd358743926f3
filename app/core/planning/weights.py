"""The weights that a plan rests on, found in the headers or refused."""

from __future__ import annotations

from app.core.errors import ModelRefused
from app.core.planning.architectures import Architecture
from app.core.sources.safetensors_header import TensorHeader

# Of `quantization_config.quant_method`: what makers of models publish originals in.
PUBLISHED_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "modelopt", "modelopt_fp4")
WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def refuse_quantized(config: dict[str, object]) -> None:
    """Raises ModelRefused for weights that are no plain numbers, by their entry in config.json."""
    entry = config.get("quantization_config")
    if entry is None:
        return
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    remedy = "convert it to bfloat16 first"
    if method not in PUBLISHED_METHODS:
        remedy = f"submit the original model; if this is it, {remedy}"
    raise ModelRefused(
        "the model is quantized already" + (f", with quant_method {method!r}" if method else ""),
        code="already_quantized", remedy=remedy, param="model",
    )  # fmt: skip


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
                found = "missing" if tensor is None else f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise ModelRefused(
                    f"{name}.weight is {found}; expected a matrix of {', '.join(sorted(WEIGHT_DTYPES))}",
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


def is_matrix(tensor: TensorHeader) -> bool:
    """True for weights of at least one row and column, in a dtype that is quantized."""
    return len(tensor.shape) == 2 and 0 not in tensor.shape and tensor.dtype in WEIGHT_DTYPES


def weight_dtype(shapes: dict[str, tuple[int, int]], tensors: dict[str, TensorHeader]) -> str:
    dtypes = {tensors[name + ".weight"].dtype for name in shapes}
    if len(dtypes) > 1:
        raise ModelRefused(
            f"the linears have several dtypes: {', '.join(sorted(dtypes))}",
            code="weights_unsupported", remedy="save the model in one dtype", param="model",
        )  # fmt: skip
    return WEIGHT_DTYPES[dtypes.pop()]
