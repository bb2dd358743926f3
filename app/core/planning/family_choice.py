"""Which family a model is of: a known one, one of which only the headers speak, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from app.core.errors import ModelRefused
from app.core.planning.family import (
    EXPERT,
    EXPERT_NUMBER,
    LEAST_ROWS,
    NUMBER,
    Family,
    LayerKind,
    ScaleGroup,
    known_family,
    known_types,
    text_settings,
)
from app.core.sources.safetensors_header import TensorHeader

TYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
NUMBERED = re.compile(r"(?P<stack>.+?)\.(?P<number>\d{1,6})\.(?P<local>.+)\.weight", re.ASCII)
ROUTERS = ("gate", "router", "shared_expert_gate")
# Linears that read one input, by the names that most models give them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
TO_FIND = "what its linears share is found when the job starts"


def family_of(config: Mapping[str, object], tensors: Mapping[str, TensorHeader]) -> tuple[Family, str | None]:
    """The family of a model, and why its groups are still to be found when the job starts.

    Raises ModelRefused if it is none that could be quantized.
    """
    model_type = config.get("model_type")
    classes = config.get("architectures")
    classes = [str(each) for each in classes] if isinstance(classes, list) else []
    family = known_family(model_type) if isinstance(model_type, str) else None
    if family is not None and (not classes or stem(family.class_name) in map(stem, classes)):
        setting = differing_setting(family, config)
        return family, setting and f"{setting}: {TO_FIND}"
    if family is None and isinstance(model_type, str) and transformers_has(model_type):
        unknown = headers_family(model_type, classes, config, tensors)
        if unknown is not None:
            return unknown, f"{model_type} is not among the families that are known: {TO_FIND}"
    raise unsupported(model_type, classes, family)


def stem(class_name: str) -> str:
    """A class without its task: the language model alone is quantized, and the same in both."""
    return class_name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")


def unsupported(model_type: object, classes: list[str], family: Family | None) -> ModelRefused:
    named = f"{str(model_type)[:200]} ({', '.join(classes)[:200]})" if classes else str(model_type)[:200]
    if family is not None:
        remedy = f"of {family.model_type} the class {family.class_name} is quantized, which gives text"
    else:
        remedy = f"use a model that gives text, of one of: {', '.join(sorted(known_types()))}"
    return ModelRefused(
        f"the architecture {named} is not supported", code="architecture_unsupported",
        remedy=f"{remedy}; or take method rtn and \"evaluation\": null, which need no definition",
        param="model",
    )  # fmt: skip


def differing_setting(family: Family, config: Mapping[str, object]) -> str | None:
    """The first setting under which the layers may compute something else than those that were traced."""
    for key, traced in family.settings.items():
        value: object = config
        for name in key.split("."):
            value = value.get(name, traced) if isinstance(value, dict) else traced
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (NUMBER if is_number else value) != traced:
            return f"{key} is {value!r}, not {traced!r}"
    return None


def transformers_has(model_type: str) -> bool:
    """Whether the installed transformers has models of the type; if none is installed here, it may."""
    if not TYPE_NAME.fullmatch(model_type):
        return False
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return True
    models = Path(package.origin).parent / "models"
    return any((models / name).is_dir() for name in (model_type, model_type.removesuffix("_text")))


def headers_family(
    model_type: str, classes: list[str], config: Mapping[str, object], tensors: Mapping[str, TensorHeader]
) -> Family | None:
    """What the headers alone say: which linears each layer has. None if there is no stack of such layers."""
    layers = text_settings(config).get("num_hidden_layers")
    stacks: dict[str, dict[int, set[str]]] = {}
    for name, tensor in tensors.items():
        match = NUMBERED.fullmatch(name)
        if match and is_linear(match["local"], tensor):
            numbered = stacks.setdefault(match["stack"], {})
            numbered.setdefault(int(match["number"]), set()).add(EXPERT_NUMBER.sub(EXPERT, match["local"]))
    stack = next((s for s, each in stacks.items() if isinstance(layers, int) and len(each) >= layers), None)
    if stack is None or not classes:
        return None
    kinds = dict.fromkeys(tuple(sorted(linears)) for linears in stacks[stack].values())
    root = stack.rpartition(".")[0]
    return Family(
        model_type=model_type,
        class_name=classes[0],
        layers=stack,
        embedding=f"{root}.embed_tokens" if root else "embed_tokens",
        final=(f"{root}.norm" if root else "norm",),
        trunk=root,
        kinds=tuple(LayerKind(groups=named_groups(linears)) for linears in kinds),
    )


def is_linear(name: str, tensor: TensorHeader) -> bool:
    last = name.rpartition(".")[2]
    return (
        len(tensor.shape) == 2 and min(tensor.shape) >= LEAST_ROWS and last not in ROUTERS
        and not last.startswith("embed")
    )  # fmt: skip


def named_groups(linears: tuple[str, ...]) -> tuple[ScaleGroup, ...]:
    """The linears, those together that by their names read one input."""
    groups: dict[str, list[str]] = {}
    for name in linears:
        parent, _, last = name.rpartition(".")
        together = next((names for names in TOGETHER if last in names), (last,))
        groups.setdefault(f"{parent}.{together[0]}", []).append(name)
    return tuple(ScaleGroup(balance_layers=tuple(names), unscaled=TO_FIND) for names in groups.values())
