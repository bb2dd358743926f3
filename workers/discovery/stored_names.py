"""The names that checkpoints give a model's tensors, by values: each tensor of a random model is unique."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from app.core.planning.family import Experts
from workers.discovery.layer_tracing import digest
from workers.discovery.random_weights import refused
from workers.modeling.experts import ExpertsForm, experts_of, split_weights

Pairs = tuple[tuple[str, str], ...]
Joined = tuple[tuple[str, tuple[str, ...]], ...]
PLAIN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class StoredLayer:
    """Names within one layer: of transformers' tensors in checkpoints, and of its experts."""

    prefix: str
    names: dict[str, str]
    experts: Experts | None
    joined: Joined = ()  # tensors that checkpoints hold in parts


class StoredModel:
    """A model as save_pretrained would write it."""

    def __init__(self, model: PreTrainedModel) -> None:
        try:
            stored = revert_weight_conversion(model, dict(model.state_dict()))
        except Exception as fault:  # conversions are code of transformers, which raises what it likes
            raise refused(f"its checkpoint can't be written: {type(fault).__name__}: {fault}") from fault
        self.stored: dict[str, Tensor] = stored
        self.by_value: dict[bytes, list[str]] = {}
        self.model = model
        for name, value in stored.items():
            self.by_value.setdefault(digest(value), []).append(name)

    def name_of(self, name: str, value: Tensor) -> str | None:
        """The stored name of a value; its own where several tensors hold the same."""
        names = self.by_value.get(digest(value), [])
        return name if name in names else next(iter(names), None)

    def layer(self, path: str, layer: nn.Module) -> StoredLayer:
        """Names in one layer of the unchanged model. Raises ModelRefused for experts of an unknown form."""
        full = {name: self.name_of(f"{path}.{name}", value) for name, value in layer.state_dict().items()}
        prefix = common_prefix([each for each in full.values() if each], path.rpartition(".")[2])
        names = {
            name: each.removeprefix(prefix) for name, each in full.items() if each and each.startswith(prefix)
        }
        experts = None
        for module_path, module in layer.named_modules():
            form = experts_of(module)
            if form is None:
                continue
            if experts is not None:
                raise refused("a layer has several blocks of experts")
            experts, of_experts = self.experts(f"{path}.{module_path}", module, form, prefix)
            experts = experts.model_copy(update={"module": module_path})
            # A single expert's tensor has the values of the fused one.
            names = {name: each for name, each in names.items() if each not in of_experts.values()}
            names |= {f"{module_path}.{name}": each for name, each in of_experts.items()}
        return StoredLayer(prefix, names, experts, self.joined(layer, full, prefix))

    def joined(self, layer: nn.Module, full: Mapping[str, str | None], prefix: str) -> Joined:
        """Tensors that are stored in parts, one below the other: convolutions of several inputs."""
        stored = {n.removeprefix(prefix): v for n, v in self.stored.items() if n.startswith(prefix)}
        joined = {
            name: rows_of(value, stored)
            for name, value in layer.state_dict().items()
            if full[name] is None and value.dim() == 3 and value.shape[1] == 1
        }
        return tuple((name, parts) for name, parts in joined.items() if parts)

    def outside(self, path: str, prefix: str, called: set[str]) -> dict[str, str]:
        """Stored names of what a text reaches outside of the layers, where its root does not give them.

        path: of the module list; prefix: of its first layer in checkpoints.
        """
        inside = path.rpartition(".")[0] + "."
        root = prefix.removesuffix(".").rpartition(".")[0].rpartition(".")[0]
        root = root + "." if root else ""
        names = {}
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        for name, value in self.model.state_dict().items():
            if name.rpartition(".")[0] not in called or name.startswith(path + "."):
                continue
            if table is head and value.data_ptr() == table.data_ptr():
                continue  # either name may be in the files
            stored = self.name_of(name, value)
            expected = root + name.removeprefix(inside) if name.startswith(inside) else name
            if stored is not None and stored != expected:
                names[name] = stored
        return names

    def towers(self, called: set[str]) -> tuple[str, ...]:
        """Modules with linears that no text reaches and checkpoints call otherwise, by their last names."""
        towers = []
        for path, module in self.model.named_modules():
            parent, _, last = path.rpartition(".")
            reached = parent not in called or any(
                each == path or each.startswith(path + ".") for each in called
            )
            if reached or not any(isinstance(each, nn.Linear) for each in module.modules()):
                continue
            names = (self.name_of(f"{path}.{name}", value) for name, value in module.state_dict().items())
            if any(name is not None and last not in name.split(".") for name in names):
                towers.append(last)
        return tuple(dict.fromkeys(towers))

    def experts(
        self, path: str, module: nn.Module, form: ExpertsForm, prefix: str
    ) -> tuple[Experts, dict[str, str]]:
        """The record of fused experts, and the stored names of their linears by name within the module."""
        plain = Experts(module=path, **PLAIN)
        weights = dict(split_weights(module, form, plain))
        full = {name: self.name_of(name, value) for name, value in weights.items()}
        record: dict[str, Any] = {
            "biased": form.biased, "transposed": form.transposed, "interleaved": form.interleaved,
        }  # fmt: skip
        names: dict[str, str] = {}
        fused = {"fused_up": "gate_up_proj" if form.gated else "up_proj", "fused_down": "down_proj"}
        for key, own in fused.items():
            value = getattr(module, own)
            for transposed in (False, True):
                name = self.name_of("", value.transpose(1, 2) if transposed else value)
                if name is not None and name not in full.values():  # one expert's name where there is one
                    record |= {key: name.removeprefix(prefix), "transposed": form.transposed ^ transposed}
                    names[own] = name.removeprefix(prefix)
        linears = {kind: full.get(f"0.{name}.weight") for kind, name in PLAIN.items()}
        for kind, stored in linears.items():
            own = stored.rpartition(".")[0].rpartition(".")[2] if stored else PLAIN[kind]
            record[kind] = own if kind != "gate" or form.gated else ""
        for name, stored in full.items():
            number, linear, tensor = name.split(".")
            kind = next(kind for kind, each in PLAIN.items() if each == linear)
            if stored is not None:
                names[f"{number}.{record[kind]}.{tensor}"] = stored.removeprefix(prefix)
        if not names:
            raise refused(
                f"checkpoints store its experts ({type(module).__name__}) in a form that is not known"
            )
        return Experts(module=path, **record), names


def rows_of(value: Tensor, stored: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The stored tensors that are the value, one below the other; none if there are no such."""
    names: list[str] = []
    rows = 0
    while rows < len(value):
        match = (n for n, each in stored.items() if torch.equal(value[rows : rows + len(each)], each))
        name = next(match, None)
        if name is None:
            return ()
        names.append(name)
        rows += len(stored[name])
    return tuple(names)


def common_prefix(names: Iterable[str], number: str) -> str:
    """The stored prefix of a layer's names, up to its number."""
    prefixes: Counter[str] = Counter()
    for name in names:
        for match in re.finditer(rf"(?:^|(?<=\.)){number}\.", name):
            prefixes[name[: match.end()]] += 1
    if not prefixes:
        raise refused("checkpoints do not store its layers one by one")
    return max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)))


def prefix_pairs(names: Mapping[str, str]) -> Pairs:
    """The shortest prefixes, in transformers and in checkpoints, that turn names into the stored ones, and
    back."""
    pairs: dict[str, str] = {}
    for name, stored in names.items():
        if renamed(name, pairs) == stored:
            continue
        ours, theirs = name.split("."), stored.split(".")
        shared: list[str] = []
        while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
            shared.insert(0, ours.pop())
            theirs.pop()
        for used in range(len(shared) + 1):
            end = "." if used < len(shared) else ""
            start = ".".join([*ours, *shared[:used]]) + end, ".".join([*theirs, *shared[:used]]) + end
            if all(agrees(start, *each) for each in names.items()):
                break
        pairs[start[0]] = start[1]
    return tuple(sorted(pairs.items(), key=lambda pair: (-len(pair[0]), pair)))


def agrees(pair: tuple[str, str], name: str, stored: str) -> bool:
    """Whether the prefixes, read either way, lead from one name to the other, or concern neither."""
    inside, outside = pair
    there = not name.startswith(inside) or outside + name.removeprefix(inside) == stored
    return there and (not stored.startswith(outside) or inside + stored.removeprefix(outside) == name)


def renamed(name: str, pairs: Mapping[str, str]) -> str:
    for inside, stored in sorted(pairs.items(), key=lambda pair: -len(pair[0])):
        if name.startswith(inside):
            return stored + name.removeprefix(inside)
    return name
