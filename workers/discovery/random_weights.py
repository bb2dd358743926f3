"""A tiny model of any causal language model's class, with every norm, bias and weight random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from app.core.errors import ModelRefused
from workers.discovery.shrunk_config import shrunk_config, whole_config

Signature = tuple[tuple[object, ...], ...]
MAX_PARAMETERS = 80_000_000
MAPS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


def refused(reason: str, remedy: str = "") -> ModelRefused:
    return ModelRefused(
        reason,
        code="architecture_unsupported",
        remedy=remedy or "use a model of another architecture (docs/models.md lists them)",
        param="model",
    )


def text_classes(model_type: str) -> list[str]:
    """Names of transformers' classes that give a type text."""
    names: list[str] = []
    for table in MAPS:
        entry = table.get(model_type, ())
        names += [entry] if isinstance(entry, str) else list(entry)
    return list(dict.fromkeys(names))


def model_classes(config: PretrainedConfig, architectures: Sequence[str] = ()) -> list[type[PreTrainedModel]]:
    """The class that config.json names, then the others, first those that take this config.

    Raises ModelRefused if transformers has none, or they lack a package.
    """
    names = text_classes(config.model_type) + text_classes(config.get_text_config().model_type)
    named = [name for name in architectures if name in names]
    if not names or (architectures and not named and hasattr(transformers, architectures[0])):
        raise refused(f"transformers has no class that gives {config.model_type} text")
    classes = [getattr(transformers, name) for name in dict.fromkeys(named + names)]
    present = [each for each in classes if hasattr(each, "config_class")]
    if not present:
        raise refused(
            f"{classes[0].__name__} needs a package that is absent: {missing_package(classes[0])}",
            "install that package on the worker",
        )
    return sorted(
        present, key=lambda each: (each.__name__ not in named, each.config_class is not type(config))
    )


def missing_package(stand_in: Any) -> str:
    return ", ".join(getattr(stand_in, "_backends", ())) or "its name is not given"


def tiny_model(
    raw: Mapping[str, Any], *, grouped: bool = True, chosen: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """The model of a config.json at tiny size, with as many layers as it takes to have every kind of them.

    Raises ModelRefused if transformers has no class for it, or its size stays large.
    """
    chosen = chosen or classes_of(raw)[0]
    config = fewest_layers(chosen, raw, grouped=grouped)
    torch.manual_seed(0)
    model = built(chosen, config)
    randomize(model)
    return model.eval()


def classes_of(raw: Mapping[str, Any]) -> list[type[PreTrainedModel]]:
    return model_classes(whole_config(raw), raw.get("architectures") or ())


def fewest_layers(
    chosen: type[PreTrainedModel], raw: Mapping[str, Any], *, grouped: bool
) -> PretrainedConfig:
    """The tiny config with the first layers only, if they are of as many kinds as all."""
    config = shrunk_config(raw, grouped=grouped)
    with torch.device("meta"):
        model = built(chosen, config)
        size = sum(p.numel() for p in model.parameters())
        signatures = layer_signatures(model)
        first = max((signatures.index(each) for each in signatures), default=0)
        if len(signatures) > first + 2:
            fewer = shrunk_config(raw, grouped=grouped, layers=first + 2)
            model = built(chosen, fewer)
            if layer_signatures(model) == signatures[: first + 2]:
                config, size = fewer, sum(p.numel() for p in model.parameters())
    if size > MAX_PARAMETERS:
        raise refused(
            f"its tiny model has {size / 1e6:.0f} M parameters, more than {MAX_PARAMETERS / 1e6:.0f} M"
        )
    return config


def layer_signatures(model: nn.Module) -> list[Signature]:
    """Of the members of the largest module list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=())
    return [signature(each) for each in largest]


def signature(layer: nn.Module) -> Signature:
    """What makes two layers compute alike: modules with their classes, shapes and switches."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | str | None) and not key.startswith("_") and key != "training"
            ),
        )
        for name, module in layer.named_modules()
    )


def built(chosen: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    if chosen.config_class is not type(config):
        config = config.get_text_config()
    attention = "sdpa" if getattr(chosen, "_supports_sdpa", False) else "eager"
    model: PreTrainedModel = chosen._from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model.float().requires_grad_(requires_grad=False)


def randomize(model: nn.Module) -> None:
    """Random values around each vector's initial ones; matrices that keep the size of what they read."""
    generator = torch.Generator().manual_seed(7)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in tables:
            parameter.copy_(noise / 8)
        elif parameter.dim() < 2:
            parameter.add_((0.1 if name.endswith("bias") else 0.2) * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
