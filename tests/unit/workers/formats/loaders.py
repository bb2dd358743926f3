"""How loaders find a module's scheme in an entry of config.json, said again from their sources.

vLLM 0.33.0: `is_layer_skipped`, `get_dynamic_override`, `find_matching_patterns` and `find_matched_target`
below `model_executor/layers/quantization`. SGLang 0.5.23: the functions of the same purpose below
`srt/layers/quantization`. transformers and compressed-tensors are asked themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_name
from transformers.quantizers.quantizers_utils import should_convert_module

from app.core.formats.file_format import Scheme

Entry = dict[str, Any]
Fused = Mapping[str, tuple[str, ...]]
Matches = Callable[[str], bool]


def shards(name: str, fused: Fused) -> list[str]:
    """The parts' names of a fused matrix, or the name itself."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in fused[leaf]] if leaf in fused else [name]


def kept(name: str, fused: Fused, matches: Matches) -> bool:
    """True if the whole is named, or all of its parts; vLLM and SGLang raise if only some are."""
    found = {matches(name) or matches(part) for part in shards(name, fused)}
    assert len(found) == 1, f"some parts of {name} only"
    return found.pop()


def group_scheme(weights: Mapping[str, Any]) -> Scheme:
    size = -1 if weights["strategy"] == "channel" else weights["group_size"]
    return Scheme(bits=weights["num_bits"], group_size=size, symmetric=weights["symmetric"])


def named(name: str, target: str, *, suffix: bool = False) -> bool:
    """`suffix`: SGLang's `ignore` also means modules whose last parts have the name."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target or (suffix and name.endswith("." + target))


def awq_server(entry: Entry, name: str, fused: Fused) -> Scheme | None:
    """vLLM and SGLang: a listed name is part of the module's name. SGLang has no fused names: pass none."""
    if kept(name, fused, lambda each: any(part in each for part in entry["modules_to_not_convert"])):
        return None
    return Scheme(bits=entry["bits"], group_size=entry["group_size"], symmetric=not entry["zero_point"])


def awq_transformers(entry: Entry, name: str) -> Scheme | None:
    """As transformers: the pattern's start or end up to a module's border; AutoAWQ: as the servers."""
    convert = should_convert_module(name, entry["modules_to_not_convert"])
    autoawq = awq_server(entry, name, {})
    assert convert is (autoawq is not None), name
    return autoawq


def gptq_server(entry: Entry, name: str) -> Scheme | None:
    """As vLLM, SGLang and GPTQModel: the first rule that matches the start of the name."""
    for rule, changes in entry.get("dynamic", {}).items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else Scheme(symmetric=entry["sym"], **changes)
    return Scheme(bits=entry["bits"], group_size=entry["group_size"], symmetric=entry["sym"])


def ct_server(entry: Entry, name: str, fused: Fused, *, suffix: bool = False) -> Scheme | None:
    """As vLLM, or as SGLang with `suffix`: `ignore`, then the first target of the whole or of each part."""
    if kept(name, fused, lambda each: any(named(each, target, suffix=suffix) for target in entry["ignore"])):
        return None
    groups = entry["config_groups"].values()
    targets = [(target, group["weights"]) for group in groups for target in group["targets"]]
    found = first(targets, name)
    if found is None:
        parts = [first(targets, part) for part in shards(name, fused)]
        assert None not in parts, f"no target matches {name}: SGLang raises, vLLM loads plain weights"
        found = parts[0]
    assert found is not None
    return group_scheme(found)


def first(targets: Iterable[tuple[str, Mapping[str, Any]]], name: str) -> Mapping[str, Any] | None:
    """`Linear` means every linear by its class, and the experts, which both servers add to it."""
    return next((weights for target, weights in targets if target == "Linear" or named(name, target)), None)


def in_vllm(entry: Entry, rename: Callable[[str], str]) -> Entry:
    """The entry after vLLM's `apply_vllm_mapper`: plain names with a dot have those of its class."""

    def renamed(names: Iterable[str]) -> list[str]:
        return [rename(name) if "." in name and not name.startswith("re:") else name for name in names]

    groups = {
        key: {**group, "targets": renamed(group["targets"])} for key, group in entry["config_groups"].items()
    }
    return {**entry, "config_groups": groups, "ignore": renamed(entry["ignore"])}


def ct_library(entry: Entry, name: str) -> Scheme | None:
    """As compressed-tensors itself: `ignore` first, then the one group that matches."""
    if any(match_name(name, target) for target in entry["ignore"]):
        return None
    config = QuantizationConfig.model_validate({k: v for k, v in entry.items() if k != "dequantize"})
    found = [
        group.weights
        for group in config.config_groups.values()
        if any(target == "Linear" or match_name(name, target) for target in group.targets)
    ]
    assert len(found) == 1
    assert found[0] is not None
    return group_scheme(found[0].model_dump(mode="json"))
