"""A causal language model that is never whole: one decoder layer holds weights at a time.

The modules are transformers' own, built on the meta device. The model's own forward pass, with every
decoder layer replaced by a recorder, tells what each layer is called with, so masks and rotary embeddings
that alternate between layers are right without knowledge of the architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from app.core.errors import ModelRefused
from app.core.planning.architectures import Architecture
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.experts import split_experts
from workers.modeling.layer_calls import ArgumentStore, LayerArguments, LayerCalls, LayerForm, alike
from workers.modeling.layer_weights import (
    Deferred,
    DeferredWeights,
    Weights,
    deferred,
    filled_when_called,
    replaced,
)

CLASSES = (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
OUTPUTS = (0, 2, 1, 3)  # lengths of the tuples that layers may return, as they are tried; 0: no tuple


class Unsuited(Exception):
    """The model calls its layers in a way that can't be taken apart."""


class Entangled(Unsuited):
    """More than the states goes from layer to layer."""


class Recorder(nn.Module):
    """Replaces a decoder layer: records its arguments and returns its states, in the form of its family.

    With a `seed` it returns random states in their place.
    """

    def __init__(
        self, layer: nn.Module, number: int, form: LayerForm, before: Recorder | None = None
    ) -> None:
        super().__init__()
        self._layer, self._before = (layer,), (before,)  # in tuples: not submodules
        self.number, self.form = number, form
        self.seed: int | None = None
        self.states: Tensor | None = None
        self.returned: Tensor | None = None
        self.version = 0  # of the memory of what is returned
        self.arguments: LayerArguments = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if self.states is not None:
            raise Unsuited(f"layer {self.number} is called more than once")
        self.states, self.arguments = arguments_by_name(self._layer[0], arguments, named)
        before = self._before[0]
        if before is not None and not before.gave(self.states):
            raise Unsuited(f"layer {self.number} does not get what layer {self.number - 1} returns")
        self.returned = self.states
        if self.seed is not None:
            noise = torch.randn(self.states.shape, generator=torch.Generator().manual_seed(self.seed))
            self.returned = noise.to(self.states)
        self.version = self.returned._version
        return self.form.output(self.returned, self.number)

    def gave(self, states: Tensor) -> bool:
        """Whether these are the returned states, unchanged: one tensor, or views of all of it."""
        mine = self.returned
        return mine is not None and (
            (states.data_ptr(), states.shape, states.stride(), states._version)
            == (mine.data_ptr(), mine.shape, mine.stride(), self.version)
        )


def arguments_by_name(
    layer: nn.Module, arguments: tuple[Any, ...], named: LayerArguments
) -> tuple[Tensor, LayerArguments]:
    """The states that a layer is called with, and its other arguments."""
    parameters = inspect.signature(layer.forward).parameters.values()
    by_position = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    if len(arguments) > len(by_position):
        raise Unsuited(f"{type(layer).__name__} has arguments without a name")
    values = {**dict(zip(by_position, arguments, strict=False)), **named}
    states = values.pop(by_position[0], None)
    if not isinstance(states, Tensor):
        raise Unsuited(f"{type(layer).__name__} does not get the states first")
    return states, values


class Replay(Recorder):
    """Replaces a decoder layer while the head runs: the first one returns the states after the last."""

    after: Tensor | None = None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        states, _ = arguments_by_name(self._layer[0], arguments, named)
        return self.form.output(states if self.after is None else self.after, self.number)


class Blank(nn.Module):
    """Replaces an embedding while the head runs: zeros, as states come from elsewhere."""

    def __init__(self, embedding: nn.Embedding, device: torch.device) -> None:
        super().__init__()
        zero = torch.zeros(1, 1, dtype=embedding.weight.dtype, device=device)
        self.weight = zero.expand(embedding.num_embeddings, embedding.embedding_dim)  # takes no memory

    def forward(self, tokens: Tensor, *_arguments: Any, **_named: Any) -> Tensor:
        return self.weight.new_zeros(*tokens.shape, self.weight.shape[1])


class NoHead(nn.Module):
    """Replaces the head where the states alone count."""

    def __init__(self, head: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.empty(0, dtype=getattr(head, "weight", torch.empty(0)).dtype, device=device)

    def forward(self, states: Tensor) -> Tensor:
        return states


class Head(nn.Module):
    """From hidden states to logits by the model's own class: all of its forward pass but the layers."""

    def __init__(self, model: nn.Module, first: Replay) -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(self, states: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """(batch, tokens, …), or (tokens, …) of one row, to the same with the vocabulary as last axis.

        `weights` by their full names replace the model's own.
        """
        form = self.first.form
        batch = states if states.dim() == form.axes else states[None]
        self.first.after = form.inside(batch)
        tokens = torch.zeros(batch.shape[:2], dtype=torch.long, device=states.device)
        inputs = {"input_ids": tokens, "use_cache": False}
        logits: Tensor = functional_call(self.model, dict(weights or {}), (), inputs).logits
        return logits if batch is states else logits[0]


class HeadInput(nn.Module):
    """The head's step: computes what the head reads, whose module is `name` here, and returns the states."""

    def __init__(self, behind: Head, name: str, head: NoHead) -> None:
        super().__init__()
        self._behind = (behind,)  # in a tuple: not a submodule
        self.add_module(name, head)

    def forward(self, states: Tensor) -> Tensor:
        self._behind[0](states)
        return states


class Decoder:
    """Embedding, decoder layers and head of a checkpoint, each loaded when it is asked for.

    Of the layers in `by_expert` the weights of experts are read when one is called, and let go after it;
    sums over their inputs go to files in `scratch`.
    """

    by_expert: frozenset[int] = frozenset()
    scratch: Path | None = None

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture
        self.device, self.dtype = device, dtype
        self.model = empty_model(checkpoint.config, architecture, dtype)
        self.model.requires_grad_(requires_grad=False)
        self.layers: nn.ModuleList = self.model.get_submodule(architecture.layers)
        path = architecture.layers.rpartition(".")[0]
        self.around, self.around_path = self.model.get_submodule(path), path + "." if path else ""
        self.towers = tuple(
            name + "." for name, module in self.model.named_modules()
            if isinstance(module, PreTrainedModel) and name and not architecture.layers.startswith(name + ".")
        )  # fmt: skip
        self.form: LayerForm | None = None
        restore_buffers(self.model, device, layers=architecture.layers)
        state_device(self.model, device)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def start(
        self,
        batches: list[Tensor],
        transform: Callable[[Tensor], Tensor] = lambda states: states,
        further: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], LayerCalls]:
        """Hidden states before the first layer per batch, each as `transform` returns it, and what layers are
        called with: for each batch, and after them for each of the `further` ones.

        Raises ModelRefused for a model whose layers can't be run one by one.
        """
        states, store = [], ArgumentStore()
        with (
            self.loaded(self.around, self.around_path, self.outside()),
            self.loaded_when_called(),
            self.without_head(),
        ):
            for number, batch in enumerate((*batches, *further)):
                recorders = self.recorded(batch.to(self.device))
                store.add(tuple(batch.shape), [recorder.arguments for recorder in recorders])
                first = recorders[0].states
                assert first is not None
                assert self.form is not None
                if number < len(batches):
                    states.append(transform(self.form.outside(first)))
        assert self.form is not None
        return states, LayerCalls(store.recorded, self.form, self.device)

    def outside(self) -> list[str]:
        """The parameters beside the layers, in the module around them but not in a tower."""
        inside = (self.architecture.layers + ".", *self.towers)
        path = self.around_path
        return [key for key in self.around.state_dict() if not (path + key).startswith(inside)]

    def recorded(self, tokens: Tensor) -> list[Recorder]:
        """The recorders after the model's own pass over the tokens; the first pass finds the layers' form."""
        if self.form is not None:
            return self.recorded_as(self.form, tokens)[0]
        why: Exception | None = None
        for outputs in OUTPUTS:
            try:
                recorders, _ = self.recorded_as(LayerForm(outputs), tokens)
                form = LayerForm(outputs, *axes_of(recorders[0].states, tokens))
                self.refuse_entangled(form, tokens[:1, :4])
            except torch.OutOfMemoryError:
                raise
            except (Unsuited, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as fault:
                why = fault if why is None or isinstance(fault, Entangled) else why
            else:
                self.form = form
                return recorders
        raise ModelRefused(
            f"the layers of {self.architecture.class_name} can't be run one by one: "
            f"{type(why).__name__}: {why}",
            code="architecture_unsupported",
            remedy="use a causal language model whose layers follow each other",
            param="model",
        ) from why

    def recorded_as(
        self, form: LayerForm, tokens: Tensor, seeds: Sequence[int] | None = None
    ) -> tuple[list[Recorder], Tensor]:
        """The recorders after a pass in which layers return states in this form, and what comes out."""
        recorders: list[Recorder] = []
        for number, layer in enumerate(self.layers):
            before = recorders[-1] if recorders else None
            recorders.append(Recorder(layer, number, form, before))
            recorders[-1].seed = seeds[number] if seeds else None
        with self.replaced(recorders):
            logits = self.model(input_ids=tokens, use_cache=False).logits
        if logits.shape[:2] != tokens.shape:
            raise Unsuited(f"after the layers states are {tuple(logits.shape)}")
        if recorders[-1].states is None:
            raise Unsuited("not every layer is called")
        return recorders, logits

    def refuse_entangled(self, form: LayerForm, tokens: Tensor) -> None:
        """Raise Entangled if anything but a layer reads the states before the last layer's."""
        count = self.num_layers
        (one, first), (other, second) = (
            self.recorded_as(form, tokens, [*range(start, start + count - 1), 0]) for start in (1, 1 + count)
        )
        for mine, theirs in zip(one, other, strict=True):
            if not alike(mine.arguments, theirs.arguments):
                raise Entangled(f"layer {mine.number} is called with something made of earlier states")
        if not alike(first, second):
            raise Entangled("what comes after the layers reads the states of several")

    @contextmanager
    def replaced(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """The model with other layers."""
        name = self.architecture.layers.rpartition(".")[2]
        setattr(self.around, name, nn.ModuleList(layers))
        try:
            yield
        finally:
            setattr(self.around, name, self.layers)

    @contextmanager
    def without_head(self) -> Iterator[NoHead]:
        """The model with states in place of logits; yields what is in the head's."""
        head = self.model.get_submodule(self.architecture.head)
        none = NoHead(head, self.device)
        self.model.set_submodule(self.architecture.head, none)
        try:
            yield none
        finally:
            self.model.set_submodule(self.architecture.head, head)

    @contextmanager
    def loaded(
        self, module: nn.Module, prefix: str, names: list[str], weights: Weights | None = None
    ) -> Iterator[nn.Module]:
        """`module` with the parameters `names` on the device, from `weights` or the checkpoint.

        `weights` go by the checkpoint's names.
        """

        def placed(name: str) -> Tensor:
            # The head as it is stored may go: it can be large.
            return self.computed(
                weights[self.architecture.stored_name(name)] if weights else self.stored(prefix + name)
            )

        state = {name: placed(name) for name in names}
        module.load_state_dict(state, strict=False, assign=True)
        try:
            yield module
        finally:
            meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
            module.load_state_dict(meta, strict=False, assign=True)

    def computed(self, value: Tensor) -> Tensor:
        """A stored tensor as the model computes with it."""
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    @contextmanager
    def loaded_when_called(self) -> Iterator[None]:
        """Towers, and modules beyond that around the layers, get their weights when they are called first.

        What a text does not reach is never loaded.
        """
        head = self.architecture.head
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                own = [key for key in module.state_dict() if "." not in key]
                around = f"{name}.".startswith(self.around_path) and not f"{name}.".startswith(self.towers)
                if own and name != head and not around:
                    self.load_at_call(stack, module, name, own)
            yield

    def load_at_call(self, stack: ExitStack, module: nn.Module, name: str, own: list[str]) -> None:
        def load(*_call: Any) -> None:
            handle.remove()
            stack.enter_context(self.loaded(module, name + "." if name else "", own))

        handle = module.register_forward_pre_hook(load)
        stack.callback(handle.remove)

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

    def layer_weights(self, index: int, *, pinned: bool = False) -> Weights:
        """The checkpoint's tensors of a layer that the model uses, by name within the layer.

        Of the head's step that is the head's matrix.
        """
        prefix = self.architecture.layer_prefix(index)
        if self.architecture.is_head(index):
            (name,) = self.architecture.at(index).linears
            return {f"{name}.weight": self.checkpoint.tensor(f"{prefix}{name}.weight", pinned=pinned)}
        used = {prefix + self.architecture.stored_name(name) for name in self.layers[index].state_dict()}
        used |= {prefix + stored for _, parts in self.architecture.kind(index).joined for stored in parts}
        unused = [name for name in self.checkpoint.names(prefix) if name not in used]
        if index not in self.by_expert:
            return self.checkpoint.layer_tensors(prefix, unused, pinned=pinned)
        later = [f"{linear}.weight" for linear in self.architecture.expert_linears(index)]
        held = self.checkpoint.layer_tensors(
            prefix, {*unused, *(prefix + name for name in later)}, pinned=pinned
        )
        reads = {
            name: Deferred(
                self.checkpoint.tensors[prefix + name].shape,
                partial(self.checkpoint.tensor, prefix + name, pinned=pinned),
            )
            for name in later
        }
        return DeferredWeights(held, reads)

    def scratch_of(self, index: int) -> Path | None:
        """Where the sums of a layer's experts lie, if not in memory."""
        return self.scratch if index in self.by_expert else None

    def with_joined(self, index: int, weights: Weights) -> Weights:
        """The weights of a layer, and those that checkpoints hold in parts as transformers has them."""
        joined = self.architecture.kind(index).joined
        return replaced(
            weights, {name: torch.cat([weights[each] for each in parts]) for name, parts in joined}
        )

    @contextmanager
    def layer(self, index: int, weights: Weights) -> Iterator[nn.Module]:
        """Decoder layer `index` filled with `weights`; deferred ones are there while they are used.

        The head's step is all that is behind the layers, without the head.
        """
        if self.architecture.is_head(index):
            (name,) = self.architecture.at(index).linears
            with self.without_head() as head, self.behind_layers() as behind:
                yield HeadInput(behind, self.architecture.module_name(name), head)
            return
        layer, weights = self.layers[index], self.with_joined(index, weights)
        stored = {name: self.architecture.stored_name(name) for name in layer.state_dict()}
        later = deferred(weights)
        makes = {name: later[key].make for name, key in stored.items() if key in later}
        names = [name for name in stored if name not in makes]
        with (
            self.loaded(layer, "", names, weights) as filled,
            filled_when_called(filled, makes, self.computed),
        ):
            yield filled

    @contextmanager
    def head(self) -> Iterator[Head]:
        """All that comes after the layers, as one module from hidden states to logits."""
        head, path = self.model.get_submodule(self.architecture.head), self.architecture.head
        with self.behind_layers() as behind, self.loaded(head, path + ".", list(head.state_dict())):
            yield behind

    def head_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the head's step by their names in the model, as it computes with them."""
        return {
            f"{self.architecture.head}.{name.rpartition('.')[2]}": value.to(self.device, self.dtype)
            for name, value in weights.items()
        }

    @contextmanager
    def behind_layers(self) -> Iterator[Head]:
        """The same without the weights of the head's own module."""
        if self.form is None:
            self.start([torch.zeros(1, 2, dtype=torch.long)])
        assert self.form is not None
        replays = [Replay(layer, number, self.form) for number, layer in enumerate(self.layers)]
        with ExitStack() as stack:
            blanks = stack.enter_context(self.blank_embeddings())
            names = [
                name for name in self.outside() if self.around_path + name.rpartition(".")[0] not in blanks
            ]
            stack.enter_context(self.loaded(self.around, self.around_path, names))
            stack.enter_context(self.loaded_when_called())
            stack.enter_context(self.replaced(replays))
            yield Head(self.model, replays[0])

    @contextmanager
    def blank_embeddings(self) -> Iterator[list[str]]:
        """The model without the embeddings beside its layers; yields their names."""
        layers = self.architecture.layers + "."
        tables = {
            name: module for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and not name.startswith(layers)
        }  # fmt: skip
        for name, table in tables.items():
            self.model.set_submodule(name, Blank(table, self.device))
        try:
            yield list(tables)
        finally:
            for name, table in tables.items():
                self.model.set_submodule(name, table)


def axes_of(states: Tensor | None, tokens: Tensor) -> tuple[int, int]:
    """The axis of the batch, which that of the tokens follows, and the number of axes of states."""
    assert states is not None
    for axis in range(states.dim() - 2):
        if states.shape[axis : axis + 2] == tokens.shape:
            return axis, states.dim()
    raise Unsuited(f"states are {tuple(states.shape)} for tokens {tuple(tokens.shape)}")


def empty_model(raw: dict[str, Any], architecture: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config.json, without weights and with experts as linears.

    Raises ModelRefused if the config's values give none.
    """
    try:
        model_class = class_of(architecture)
        config = text_config(raw)
        if not isinstance(config, model_class.config_class):
            config = config.get_text_config()
        for each in (config, config.get_text_config()):
            each.output_router_logits = False  # no layer stays to give any
        with torch.device("meta"):
            model: PreTrainedModel = model_class._from_config(
                config, dtype=dtype, attn_implementation=architecture.attention
            )
        for number, layer in enumerate(model.get_submodule(architecture.layers)):
            experts = architecture.at(number).experts
            if experts is not None:
                split_experts(layer, experts)
    except ModelRefused:
        raise
    except Exception as fault:  # a config is code of transformers, which raises what it likes
        raise ModelRefused(
            f"config.json gives no model: {type(fault).__name__}: {fault}",
            code="config_invalid", remedy="restore the model's original config.json",
        ) from fault  # fmt: skip
    return model.eval()


def state_device(model: PreTrainedModel, device: torch.device) -> None:
    """Let a model say it is on the device; else it looks at its first parameter, which may have no memory."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            own = type(module)
            module.__class__ = type(own.__name__, (own,), {"device": device, "__module__": own.__module__})


def class_of(architecture: Architecture) -> type[PreTrainedModel]:
    """transformers' class by its name, which must be one of those that give text.

    Raises ModelRefused for another.
    """
    names = chain.from_iterable(
        (entry,) if isinstance(entry, str) else entry for classes in CLASSES for entry in classes.values()
    )
    if architecture.class_name not in names:
        raise ModelRefused(
            f"{architecture.class_name} is no class of transformers {transformers.__version__} "
            "that gives text",
            code="architecture_unsupported", remedy="use a causal language model", param="model",
        )  # fmt: skip
    model_class: type[PreTrainedModel] = getattr(transformers, architecture.class_name)
    return model_class


def text_config(raw: dict[str, Any]) -> PretrainedConfig:
    """The configuration by our own knowledge of its type: no code of the model's folder is looked at."""
    values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    # As transformers reads its own files, in which infinity is an object.
    return AutoConfig.for_model(raw["model_type"], **PretrainedConfig._decode_special_floats(values))


def restore_buffers(model: PreTrainedModel, device: torch.device, *, layers: str = "") -> None:
    """Buffers that no checkpoint holds (rotary frequencies, factors) are computed anew on the device.

    With the path of the decoder layers those of other models within a wrapper stay as they are.
    """
    owners: dict[str, PreTrainedModel] = {}
    modules, lost = dict(model.named_modules()), dict[str, list[str]]()
    for name, module in modules.items():
        owners[name] = module if isinstance(module, PreTrainedModel) else owners[name.rpartition(".")[0]]
        path = next(path for path, each in owners.items() if each is owners[name])
        keys = [key for key in module._non_persistent_buffers_set if getattr(module, key) is not None]
        if keys and (path == "" or f"{layers or path}.".startswith(f"{path}.")):
            lost[name] = keys
            for key in keys:
                setattr(module, key, torch.empty_like(getattr(module, key), device="cpu"))
    around = {"", *lost, *(name[:end] for name in lost for end in range(len(name)) if name[end] == ".")}
    for name in reversed(list(modules)):  # as transformers does: some fill the buffers of modules within them
        if lost and name in around:
            owners[name]._init_weights(modules[name])
    for name, keys in lost.items():
        for key in keys:
            setattr(modules[name], key, getattr(modules[name], key).to(device))
