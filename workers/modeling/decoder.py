"""A causal language model that is never whole: one decoder layer holds weights at a time.

The modules are transformers' own, built on the meta device. The model's own forward pass, with every
decoder layer replaced by a recorder, tells what each layer is called with, so masks and rotary embeddings
that alternate between layers are right without knowledge of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from app.core.errors import ModelRefused
from app.core.planning.architectures import Architecture
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.experts import split_experts

LayerArguments = dict[str, Any]


class Recorder(nn.Module):
    """Replaces a decoder layer: records its arguments and returns the states unchanged."""

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


class Final(nn.Module):
    """Replaces all modules before the head: returns the given states after the final norm."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.after_layers = nn.Sequential(*modules)
        self.states: Tensor | None = None

    def forward(self, *_tokens: Any, **_arguments: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.after_layers(self.states))


class Head(nn.Module):
    """From hidden states to logits by the model's own class, which applies logit scales and caps."""

    def __init__(self, model: nn.Module, final: Final) -> None:
        super().__init__()
        self.model, self.final = model, final

    def forward(self, states: Tensor) -> Tensor:
        """(..., tokens, hidden) to (..., tokens, vocabulary)."""
        self.final.states = states if states.dim() == 3 else states[None]
        tokens = torch.zeros(1, 1, dtype=torch.long, device=states.device)
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits if states.dim() == 3 else logits[0]


class Decoder:
    """Embedding, decoder layers and head of a checkpoint, each loaded when it is asked for."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture
        self.device, self.dtype = device, dtype
        self.model = empty_model(checkpoint.config, architecture, dtype)
        self.model.requires_grad_(requires_grad=False)
        self.layers: nn.ModuleList = self.model.get_submodule(architecture.layers)
        restore_buffers(self.model, device)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def start(
        self, batches: list[Tensor], transform: Callable[[Tensor], Tensor] = lambda states: states
    ) -> tuple[list[Tensor], dict[int, list[LayerArguments]]]:
        """Hidden states before the first layer per batch, each as `transform` returns it, and each layer's
        arguments by batch size."""
        path, _, name = self.architecture.layers.rpartition(".")
        base = self.model.get_submodule(path)
        recorders = [Recorder(layer) for layer in self.layers]
        states: list[Tensor] = []
        arguments: dict[int, list[LayerArguments]] = {}
        outside = [key for key in base.state_dict() if not key.startswith(f"{name}.")]
        with self.loaded(base, path + ".", outside):
            setattr(base, name, nn.ModuleList(recorders))
            try:
                for batch in batches:
                    base(input_ids=batch.to(self.device), use_cache=False)
                    first = recorders[0].states
                    assert first is not None
                    states.append(transform(first))
                    if batch.shape[0] not in arguments:
                        arguments[batch.shape[0]] = [recorder.arguments for recorder in recorders]
            finally:
                setattr(base, name, self.layers)
        return states, arguments

    @contextmanager
    def loaded(
        self, module: nn.Module, prefix: str, names: list[str], weights: dict[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """`module` with the parameters `names` on the device, from `weights` or the checkpoint.

        `weights` go by the checkpoint's names.
        """

        def placed(name: str) -> Tensor:
            value = weights[self.architecture.stored_name(name)] if weights else self.stored(prefix + name)
            return value.to(self.device, self.dtype)  # the head as it is stored may go: it can be large

        state = {name: placed(name) for name in names}
        module.load_state_dict(state, strict=False, assign=True)
        try:
            yield module
        finally:
            meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
            module.load_state_dict(meta, strict=False, assign=True)

    def stored(self, name: str) -> Tensor:
        """A tensor of the checkpoint by transformers' name."""
        return self.checkpoint.tensor(self.stored_name(name))

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a tensor; a tied head may read the embedding."""
        names, stored = self.architecture.head_names, self.architecture.checkpoint_name(name)
        if name.startswith(self.architecture.layers + "."):
            return stored
        candidates = names if name == names[0] else (name, stored)
        return next((each for each in candidates if each in self.checkpoint.tensors), name)

    def layer_weights(self, index: int, *, pinned: bool = False) -> dict[str, Tensor]:
        """The checkpoint's tensors of a layer that the model uses, by name within the layer."""
        prefix = self.architecture.layer_prefix(index)
        used = {prefix + self.architecture.stored_name(name) for name in self.layers[index].state_dict()}
        unused = [name for name in self.checkpoint.names(prefix) if name not in used]
        return self.checkpoint.layer_tensors(prefix, unused, pinned=pinned)

    @contextmanager
    def layer(self, index: int, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
        """Decoder layer `index` filled with `weights`."""
        layer = self.layers[index]
        with self.loaded(layer, "", list(layer.state_dict()), weights) as filled:
            yield filled

    def advance(self, layer: nn.Module, states: Tensor, arguments: LayerArguments) -> Tensor:
        """One decoder layer over one batch: (batch, tokens, hidden) in and out."""
        output: Tensor | tuple[Tensor, ...] = layer(states, **arguments)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """Final norm and language model head, as one module from hidden states to logits."""
        path = self.architecture.layers.rpartition(".")[0]
        base, head = self.model.get_submodule(path), self.model.get_submodule(self.architecture.head)
        parts = {name: self.optional(name) for name in self.architecture.final}
        final = Final([module for module in parts.values() if module is not None])
        with ExitStack() as loaded:
            for name, module in (*parts.items(), (self.architecture.head, head)):
                if module is not None:
                    loaded.enter_context(self.loaded(module, name + ".", list(module.state_dict())))
            self.model.set_submodule(path, final)
            try:
                yield Head(self.model, final)
            finally:
                self.model.set_submodule(path, base)

    def optional(self, path: str) -> nn.Module | None:
        """A submodule that a model may do without."""
        parent, _, name = path.rpartition(".")
        return getattr(self.model.get_submodule(parent), name, None)


def empty_model(raw: dict[str, Any], architecture: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config.json, without weights and with experts as linears.

    Raises ModelRefused if the config's values give none.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                text_config(raw), dtype=dtype, attn_implementation=architecture.attention
            )
    except Exception as fault:  # a config is code of transformers, which raises what it likes
        raise ModelRefused(
            f"config.json gives no model: {type(fault).__name__}: {fault}",
            code="config_invalid", remedy="restore the model's original config.json",
        ) from fault  # fmt: skip
    if architecture.experts is not None:
        for layer in model.get_submodule(architecture.layers):
            split_experts(layer, architecture.experts)
    return model.eval()


def text_config(raw: dict[str, Any]) -> PretrainedConfig:
    """The configuration by our own knowledge of its type: no code of the model's folder is looked at."""
    values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(raw["model_type"], **values)


def restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, factors) are computed anew on the device."""
    for module in model.modules():
        lost = module._non_persistent_buffers_set
        if lost:
            for name in lost:
                setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
            model._init_weights(module)
            for name in lost:
                setattr(module, name, getattr(module, name).to(device))
