"""Experts that a checkpoint holds in one tensor each way, as the matrices of every expert. No weight is read.

Everyone else sees linears alone: the fused tensors go, and in their stead come headers of their parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from app.core.errors import ModelRefused
from app.core.planning.family import EXPERT, Experts, LayerKind
from app.core.sources.safetensors_header import DTYPE_BITS, TensorHeader

MAX_EXPERTS = 4096
FUSED, FUSED_DOWN = ("up_proj", "gate_up_proj"), "down_proj"  # of transformers: without and with a gate


def split_fused_experts(
    tensors: Mapping[str, TensorHeader], layers: str, kinds: Iterable[LayerKind]
) -> dict[str, TensorHeader]:
    """The tensors of a checkpoint whose decoder layers are `layers`.0, `layers`.1, …

    Raises ModelRefused if shapes of fused tensors contradict each other, or for more than MAX_EXPERTS.
    """
    split = dict(tensors)
    for name, parts in fused_experts(tensors, layers, kinds).items():
        del split[name]
        split |= parts
    return split


def fused_experts(
    tensors: Mapping[str, TensorHeader], layers: str, kinds: Iterable[LayerKind]
) -> dict[str, dict[str, TensorHeader]]:
    """The tensors that hold experts of a layer, each with the experts' own tensors in it, by their names.

    Raises as `split_fused_experts`.
    """
    fused: dict[str, dict[str, TensorHeader]] = {}
    for kind in kinds:
        for names in fused_names(kind):
            pattern = re.compile(rf"{re.escape(layers)}\.\d+\.(?={re.escape(names[0])}$)")
            for prefix in [start[0] for name in tensors if (start := pattern.match(name))]:
                if prefix + names[0] not in fused:
                    fused |= expert_tensors(tensors, prefix, names, kind)
    return fused


def fused_names(kind: LayerKind) -> list[tuple[str, ...]]:
    """The names that a file may have: those of the family, and those of transformers' module.

    In this order: the first projections, the last one, and their biases.
    """
    experts = kind.experts
    if experts is None:
        return []
    own = f"{stem_of(kind)}."
    pairs = {(experts.fused_up, experts.fused_down), (own + FUSED[experts.gate != ""], own + FUSED_DOWN)}
    return [
        pair + tuple(name + "_bias" for name in pair) * experts.biased for pair in sorted(pairs) if all(pair)
    ]


def unsplit_linears(tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    """Linears of experts that stay fused, as in drafts: those of the first, for which vLLM 0.32 asks."""
    for name, tensor in tensors.items():
        block, _, last = name.rpartition(".")
        if len(tensor.shape) == 3 and last in (*FUSED, FUSED_DOWN) and block.endswith("experts"):
            yield from (f"{block}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))


def stem_of(kind: LayerKind) -> str:
    """What stands before an expert's number."""
    assert kind.experts is not None
    end = f".{EXPERT}.{kind.experts.down}"
    return next(name.removesuffix(end) for name in kind.linears if name.endswith(end))


def expert_tensors(
    tensors: Mapping[str, TensorHeader], prefix: str, fused: tuple[str, ...], kind: LayerKind
) -> dict[str, dict[str, TensorHeader]]:
    """In each of a layer's `fused` tensors the linears' tensors, by the names that the kind has for them."""
    experts, stem = kind.experts, stem_of(kind)
    assert experts is not None
    missing = next((name for name in fused if prefix + name not in tensors), None)
    if missing is not None:
        raise mismatch(f"{prefix}{missing} is missing beside {prefix}{fused[0]}")
    up, down, *biases = (tensors[prefix + name] for name in fused)
    first = (experts.gate, experts.up) if experts.gate else (experts.up,)
    transposed = lie_transposed(prefix + fused[0], up, down, experts)
    encoded = next(
        (each for each in (up, down) if each.encoding and (transposed or not each.quantized)), None
    )
    if encoded is not None:
        raise mismatch(f"{prefix}{fused[0]} is encoded as {encoded.encoding}, and can't be split")
    whole = [(first, up, "weight"), ((experts.down,), down, "weight")]
    whole += [(leaves, bias, "bias") for (leaves, _, _), bias in zip(whole, biases, strict=False)]
    matrices: dict[str, dict[str, TensorHeader]] = {}
    for name, (leaves, values, parameter) in zip(fused, whole, strict=True):
        across = transposed and parameter == "weight"
        views = expert_views(values, len(leaves), transposed=across, interleaved=experts.interleaved)
        matrices[prefix + name] = {
            f"{prefix}{stem}.{number}.{leaf}.{parameter}": view
            for number, each in enumerate(views)
            for leaf, view in zip(leaves, each, strict=True)
        }
    return matrices


def lie_transposed(name: str, up: TensorHeader, down: TensorHeader, experts: Experts) -> bool:
    """Whether matrices lie as (in, out). Shapes of gated ones tell: a family's files have either."""
    outer = 2 if experts.gate else 1
    if up.shape[:1] > (MAX_EXPERTS,):
        raise mismatch(f"{name} holds {up.shape[0]} experts; at most {MAX_EXPERTS} are supported")
    if len(up.shape) == len(down.shape) == 3 and up.shape[0] == down.shape[0]:
        _, rows, columns = down.shape
        fitting = {False: (outer * columns, rows), True: (columns, outer * rows)}
        ways = [way for way, shape in fitting.items() if up.shape[1:] == shape]
        if ways:
            return ways[0] if len(ways) == 1 else experts.transposed
    raise mismatch(
        f"{name} has the shape {up.shape}, which does not fit {down.shape} of {experts.fused_down}"
    )


def expert_views(
    fused: TensorHeader, outer: int, *, transposed: bool, interleaved: bool
) -> Iterator[list[TensorHeader]]:
    """Per expert, the headers of its `outer` projections: (out, in), or (out,) of a bias."""
    count, *shape = fused.shape
    if transposed:
        columns, rows = shape
        steps = (1, rows)
    else:
        rows, *inner = shape
        columns = inner[0] if inner else 1
        steps = (columns, 1)
    dimensions = len(shape)
    height, step = rows // outer, steps[0] * (outer if interleaved else 1)
    for number in range(count):
        first = number * rows * columns
        offsets = [p * steps[0] * (1 if interleaved else height) for p in range(outer)]
        yield [
            view(fused, first + offset, (height, columns)[:dimensions], (step, steps[1])[:dimensions])
            for offset in offsets
        ]


def view(fused: TensorHeader, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorHeader:
    """The values of `fused` from its `first` one on, at `strides`: of quantized ones, whole rows."""
    if fused.quantized is not None:
        columns = fused.shape[-1]
        rows = {"first_row": first // columns, "step": strides[0] // columns}
        return fused.model_copy(update={"shape": shape, "quantized": fused.quantized.model_copy(update=rows)})
    size = DTYPE_BITS[fused.dtype] // 8
    last = first + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    in_order = strides == (*shape[1:], 1)
    return fused.model_copy(
        update={
            "shape": shape,
            "start": fused.start + first * size,
            "end": fused.start + (last + 1) * size,
            "strides": () if in_order else strides,
        }
    )


def mismatch(message: str) -> ModelRefused:
    return ModelRefused(
        message, code="weights_mismatch", remedy="restore the model's original files", param="model"
    )
