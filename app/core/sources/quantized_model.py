"""A model whose weights were quantized before, as plain headers: values are computed while they are read.

Everyone behind `inspect_original` sees a model of plain weights, as with GGUF (`gguf_model.py`): the plan,
the estimate, the engine, and the files that are written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from app.core.sources.gguf_model import DTYPES
from app.core.sources.json_file import ReadableFiles, refused
from app.core.sources.model_headers import ModelHeaders, inspect_model
from app.core.sources.quantized_layouts import (
    PlainTensors,
    StoredTensors,
    awq_weights,
    compressed_weights,
    fp8_weights,
    gptq_weights,
    invalid,
    modelopt_weights,
    mxfp4_weights,
    row_fp8_weights,
)
from app.core.sources.safetensors_header import TensorHeader

ENTRY = "quantization_config"
READERS: Mapping[str, Callable[[StoredTensors, Mapping[str, Any]], PlainTensors]] = {
    "fp8": fp8_weights,
    "fbgemm_fp8": row_fp8_weights,
    "mxfp4": mxfp4_weights,
    "compressed-tensors": compressed_weights,
    "modelopt": modelopt_weights,
    "modelopt_fp4": modelopt_weights,
    "awq": awq_weights,
    "gptq": gptq_weights,
}
ORIGINAL = "submit the original model"
# Why a `quant_method` is not read, and what to do.
UNREAD = {
    "bitsandbytes": (
        "its statistics are packed in a form of their own",
        f"{ORIGINAL}, or save it with transformers' `model.dequantize()`",
    ),
    "auto-round": (
        "its files come in several layouts",
        f"export it with AutoRound's format auto_gptq, auto_awq or llm_compressor, or {ORIGINAL}",
    ),
    "torchao": ("its tensors are no safetensors of plain numbers", ORIGINAL),
    "quanto": ("its tensors are no safetensors of plain numbers", ORIGINAL),
}
# Of each method the settings with values that are read; anything else is another layout.
READ_SETTINGS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "awq": {"version": (None, "gemm", "GEMM"), "bits": (4,)},
    "gptq": {"checkpoint_format": (None, "", "gptq", "gptq_v2"), "is_marlin_format": (None, False)},
    "modelopt": {"quant_algo": ("FP8", "NVFP4")},
    "modelopt_fp4": {"quant_algo": (None, "NVFP4")},
    "compressed-tensors": {"sparsity_config": (None, {})},
}
# Names of what only quantized weights have, and of what is of use for rounded inputs or caches alone.
OF_WEIGHTS = re.compile(
    r"(.*\.)?(qweight|qzeros|scales|g_idx|weight_(packed|scale|scale_inv|scale_2|zero_point|global_scale|g_idx)|"
    r"pre_quant_scale|\w+_(blocks|scales|scale_inv))",
    re.ASCII,
)
OF_INPUTS = re.compile(
    r".*\.((input|output)_(scale|zero_point|global_scale|scale_ub)|(\w+_)?activation_scale|[kvq]_scale|"
    r"[kvq]_zero_point|weight_shape)",
    re.ASCII,
)


def inspect_original(files: ReadableFiles) -> ModelHeaders:
    """The model that a job starts from, with plain weights whatever form they are stored in.

    Raises ModelRefused as `inspect_model` does, and for quantized weights that can't be read.
    """
    return plain_headers(inspect_model(files))


def plain_headers(headers: ModelHeaders) -> ModelHeaders:
    config, entry = without_entry(headers.config)
    if entry is None:
        refuse_unnamed(headers.tensors)
        return headers
    method = method_of(entry)
    stored = StoredTensors(headers.tensors, model_dtype(config, headers.tensors))
    plain = dict(READERS[method](stored, entry))
    if not plain:
        raise invalid(
            f"config.json says quant_method {method!r}, and no tensor is stored so",
            f"remove {ENTRY} from config.json if the weights are plain",
        )
    left = {name: tensor for name, tensor in headers.tensors.items() if name not in stored.used}
    inputs = [name for name in left if OF_INPUTS.fullmatch(name)]
    tensors = {**plain, **{name: tensor for name, tensor in left.items() if name not in inputs}}
    refuse_leftovers(method, plain, left, inputs)
    in_order = {name: tensors[name] for name in ordered(headers.tensors, tensors)}
    note = source_note(method, stored.dtype, plain, rounded_inputs=bool(inputs))
    return headers.model_copy(update={"config": config, "tensors": in_order, "notes": (note, *headers.notes)})


def without_entry(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config without its entry on quantization, and that; a wrapper's text part may have it."""
    entry = None
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in (ENTRY, "compression_config"):
            entry = value if value is not None else entry
            continue
        inner = value.get(ENTRY) if isinstance(value, dict) else None
        if inner is not None:
            entry = entry or inner
            value = {name: each for name, each in value.items() if name != ENTRY}
        plain[key] = value
    if entry is not None and not isinstance(entry, dict):
        raise unread(f"{ENTRY} in config.json is {str(entry)[:100]!r}", ORIGINAL)
    return plain, entry


def method_of(entry: Mapping[str, Any]) -> str:
    """The `quant_method` of an entry. Raises ModelRefused for a kind that is not read."""
    method = entry.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        why, remedy = UNREAD.get(str(method), ("nobody has said how", ORIGINAL))
        methods = ", ".join(READERS)
        raise unread(
            f"with quant_method {str(method)[:100]!r}: {why}; read are {methods}" if method else
            f"and config.json names no quant_method; read are {methods}",
            remedy,
        )  # fmt: skip
    for key, values in READ_SETTINGS.get(method, {}).items():
        if entry.get(key) not in values:
            texts = ", ".join(str(value) for value in values if value)
            setting = f"{key} {str(entry.get(key))[:100]!r}; read is {texts or 'none'}"
            raise unread(f"with quant_method {method!r} and {setting}", ORIGINAL)
    return method


def unread(what: str, remedy: str) -> Exception:
    return refused("already_quantized", f"the model is quantized already, {what}", remedy)


def model_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> str:
    """The dtype that values are read in: the model's by config.json, else that of its plain matrices."""
    texts = (value for value in config.values() if isinstance(value, dict))
    names = {name: dtype for dtype, name in DTYPES.items()}
    for settings in (config, *texts):
        dtype = names.get(str(settings.get("dtype") or settings.get("torch_dtype")).removeprefix("torch."))
        if dtype is not None:
            return dtype
    matrices = Counter(t.dtype for t in tensors.values() if len(t.shape) == 2 and t.dtype in names.values())
    return matrices.most_common(1)[0][0] if matrices else "BF16"


def refuse_unnamed(tensors: Mapping[str, TensorHeader]) -> None:
    """Raises ModelRefused for quantized weights of which config.json says nothing."""
    marks = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
    pairs = (f"{name.removesuffix('_scales')}_blocks" for name in tensors if name.endswith("_scales"))
    marked = (name for name in tensors if name.endswith(marks))
    name = next(marked, next((name for name in pairs if name in tensors), None))
    if name is not None:
        raise invalid(
            f"the files hold {name}, of a quantized weight, and config.json has no {ENTRY}",
            "restore the model's original config.json",
        )


def refuse_leftovers(
    method: str, plain: Mapping[str, TensorHeader], left: Mapping[str, TensorHeader], inputs: list[str]
) -> None:
    """Raises ModelRefused for tensors of quantized weights that no weight takes, or a weight that is there
    twice."""
    twice = next((name for name in plain if name in left), None)
    if twice is not None:
        raise invalid(f"{twice} is stored plain and quantized", "remove one of both from the files")
    other = next((name for name in left if name not in inputs and OF_WEIGHTS.fullmatch(name)), None)
    if other is not None:
        raise invalid(
            f"{other} belongs to no weight of quant_method {method!r}: the files are of several kinds, or "
            "some of their tensors are missing"
        )


def ordered(stored: Mapping[str, TensorHeader], plain: Mapping[str, TensorHeader]) -> Iterator[str]:
    """The plain names where their files have them: by the first stored tensor of each module."""
    modules: dict[str, int] = {}
    for number, name in enumerate(stored):
        modules.setdefault(name.rpartition(".")[0], number)
    return iter(sorted(plain, key=lambda name: modules.get(name.rpartition(".")[0], len(modules))))


def source_note(method: str, dtype: str, plain: Mapping[str, TensorHeader], *, rounded_inputs: bool) -> str:
    kinds = Counter(tensor.encoding for tensor in plain.values())
    weights = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    inputs = (
        "; their servers may round the inputs of linears too, which is not done here"
        if rounded_inputs
        else ""
    )
    return (
        f"weights were quantized before ({method}; tensors: {weights}) and are read as {DTYPES[dtype]}: what "
        f"that lost is not measured here, as the original of this job is what they hold{inputs}"
    )
