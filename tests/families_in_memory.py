"""Tiny models of any family, and decoders that read their weights from memory by transformers' names."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.core.planning.architectures import Architecture
from app.core.planning.family import LayerKind
from workers.discovery.layer_tracing import find_layers
from workers.discovery.random_weights import tiny_model
from workers.modeling.decoder import Decoder


class ModelTensors:
    """What a decoder asks a checkpoint for, of a model in memory; it notes the names that were read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config: dict[str, Any] = model.config.to_dict() | {"model_type": model.config.model_type}
        self.config.pop("dtype", None)
        self.tensors: dict[str, Tensor] = dict(model.state_dict())
        self.read: set[str] = set()

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def tensor(self, name: str, *, pinned: bool = False) -> Tensor:
        assert not pinned
        self.read.add(name)
        return self.tensors[name]

    def layer_tensors(
        self, prefix: str, without: Container[str] = (), *, pinned: bool = False
    ) -> dict[str, Tensor]:
        names = [name for name in self.names(prefix) if name not in without]
        return {name.removeprefix(prefix): self.tensor(name, pinned=pinned) for name in names}


def family_model(model_type: str, *, grouped: bool = True, **changes: Any) -> PreTrainedModel:
    """A tiny random model of the type, of all kinds of layers that its default config has."""
    return tiny_model({"model_type": model_type, **changes}, grouped=grouped)


def decoder_in_memory(model: PreTrainedModel) -> Decoder:
    """With the paths that streaming needs, and no groups of linears."""
    layers, head = find_layers(model), model.get_output_embeddings()
    architecture = Architecture(
        model_type=model.config.model_type,
        class_name=type(model).__name__,
        layers=layers,
        stored_layers=layers,
        head=next(name for name, module in model.named_modules() if module is head),
        attention=model.config._attn_implementation,
        kinds=(LayerKind(groups=()),),
    )
    tensors: Any = ModelTensors(model)
    return Decoder(tensors, architecture, torch.device("cpu"), torch.float32)
