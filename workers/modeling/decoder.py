"""A causal language model that is never whole: one decoder layer holds weights at a time.

The modules are transformers' own, built on the meta device. The model's own forward pass, with every
decoder layer replaced by a recorder, tells what each layer is called with, so masks and rotary embeddings
that alternate between layers are right without knowledge of the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from app.core.architectures import Architecture
from workers.modeling.checkpoint import Checkpoint

LayerArguments = dict[str, Any]


class Recorder(nn.Module):
    """Stands in a decoder layer's place: keeps what it is called with and passes the states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: not a submodule, it has no weights yet
        self.states: Tensor | None = None
        self.arguments: LayerArguments = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.states, self.arguments = hidden_states, arguments
        return hidden_states


class Decoder:
    """Embedding, decoder layers and head of a checkpoint, each loaded when it is asked for."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture
        self.device, self.dtype = device, dtype
        config = text_config(checkpoint.config)
        with torch.device("meta"):
            self.model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            ).eval()
        self.model.requires_grad_(requires_grad=False)
        self.layers: nn.ModuleList = self.model.get_submodule(architecture.layers)
        restore_buffers(self.model, config, device)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def start(self, batches: list[Tensor]) -> tuple[list[Tensor], dict[int, list[LayerArguments]]]:
        """Hidden states before the first layer per batch, and each layer's arguments by batch size."""
        base = self.model.get_submodule(self.architecture.layers.rpartition(".")[0])
        recorders = [Recorder(layer) for layer in self.layers]
        name = self.architecture.layers.rpartition(".")[2]
        states: list[Tensor] = []
        arguments: dict[int, list[LayerArguments]] = {}
        outside = [name for name, _ in base.named_parameters() if not name.startswith("layers.")]
        with self.loaded(base, self.prefix_of(base), outside):
            setattr(base, name, nn.ModuleList(recorders))
            try:
                for batch in batches:
                    base(input_ids=batch.to(self.device), use_cache=False)
                    first = recorders[0].states
                    assert first is not None
                    states.append(first)
                    if batch.shape[0] not in arguments:
                        arguments[batch.shape[0]] = [recorder.arguments for recorder in recorders]
            finally:
                setattr(base, name, self.layers)
        return states, arguments

    def prefix_of(self, module: nn.Module) -> str:
        name = next(name for name, found in self.model.named_modules() if found is module)
        return name + "." if name else ""

    @contextmanager
    def loaded(
        self, module: nn.Module, prefix: str, names: list[str], weights: dict[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """`module` with the parameters `names` on the device, from `weights` or the checkpoint."""
        state = {
            name: (weights[name] if weights else self.stored(prefix + name)).to(self.device, self.dtype)
            for name in names
        }
        module.load_state_dict(state, strict=False, assign=True)
        try:
            yield module
        finally:
            meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
            module.load_state_dict(meta, strict=False, assign=True)

    def stored(self, name: str) -> Tensor:
        """A tensor of the checkpoint; a tied head reads the embedding."""
        if name not in self.checkpoint.tensors and name == self.architecture.head + ".weight":
            base = self.architecture.layers.rpartition(".")[0]
            name = f"{base}.embed_tokens.weight"
        return self.checkpoint.tensor(name)

    def layer_weights(self, index: int) -> dict[str, Tensor]:
        """The checkpoint's tensors of a layer by name within the layer."""
        return self.checkpoint.layer_tensors(self.architecture.layer_prefix(index))

    @contextmanager
    def layer(self, index: int, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
        """Decoder layer `index` filled with `weights`."""
        layer = self.layers[index]
        names = [name for name, _ in layer.named_parameters()]
        with self.loaded(layer, "", names, weights) as filled:
            yield filled

    def advance(self, layer: nn.Module, states: Tensor, arguments: LayerArguments) -> Tensor:
        """One decoder layer over one batch: (batch, tokens, hidden) in and out."""
        output: Tensor | tuple[Tensor, ...] = layer(states, **arguments)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """Final norm and language model head, as one module from hidden states to logits."""
        base, _, _ = self.architecture.layers.rpartition(".")
        norm = self.model.get_submodule(f"{base}.norm")
        head = self.model.get_submodule(self.architecture.head)
        norm_names = [name for name, _ in norm.named_parameters()]
        head_names = [name for name, _ in head.named_parameters()]
        with (
            self.loaded(norm, f"{base}.norm.", norm_names),
            self.loaded(head, self.architecture.head + ".", head_names),
        ):
            yield nn.Sequential(norm, head)


def text_config(raw: dict[str, Any]) -> PretrainedConfig:
    """The configuration by our own knowledge of its type: no code of the model's folder is looked at."""
    values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(raw["model_type"], **values)


def restore_buffers(model: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are computed anew on the device."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            with torch.device("cpu"):
                fresh = type(module)(config=config)
            setattr(parent, name.rpartition(".")[2], fresh.to(device))
