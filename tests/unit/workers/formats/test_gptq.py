"""The entry of GPTQ's config files, for models with experts: by the names that vLLM asks for."""

from __future__ import annotations

import re

from app.core.formats.file_format import ModuleSchemes, Scheme
from app.core.formats.registry import FORMATS

FOUR = Scheme(bits=4, group_size=128, symmetric=True)
EIGHT = Scheme(bits=8, group_size=64, symmetric=True)
HEADS = ("lm_head", "embed_out")
ROUTERS = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
EXPERTS = [f"mlp.experts.{number}.{name}" for number in range(3) for name in ("gate_proj", "down_proj")]


def rule(entry: dict[str, object], name: str) -> str | None:
    rules = entry.get("dynamic", {})
    assert isinstance(rules, dict)
    return next((f"{key[:2]}{value}" for key, value in rules.items() if re.match(key[2:], name)), None)


def test_one_scheme_needs_no_rules() -> None:
    entry = FORMATS["gptq"].entry(ModuleSchemes({"model.layers.0.mlp.down_proj": FOUR}, ("lm_head",)))
    assert "dynamic" not in entry


def test_routers_and_heads_of_other_names_keep_their_precision() -> None:
    schemes = dict.fromkeys(("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.0.gate_proj"), FOUR)
    entry = FORMATS["gptq"].entry(ModuleSchemes(schemes, (*HEADS, *ROUTERS)))
    assert entry["dynamic"] == {
        r"-:^(.*\.)?embed_out$": {}, r"-:^(.*\.)?layers\.\d+\.mlp\.gate$": {},
    }  # fmt: skip
    for name in (*schemes, "model.layers.0.mlp.gate_up_proj", "model.layers.1.mlp.experts", "lm_head"):
        assert rule(entry, name) is None


def test_experts_of_one_layer_have_one_rule_each_and_one_together() -> None:
    schemes = {
        f"model.layers.{layer}.{name}": EIGHT if layer == 1 else FOUR
        for layer in range(3)
        for name in EXPERTS
    }
    entry = FORMATS["gptq"].entry(ModuleSchemes(schemes, ()))
    assert (entry["bits"], entry["group_size"]) == (4, 128)
    assert list(entry["dynamic"]) == [
        r"+:^(.*\.)?layers\.1\.mlp\.experts\.\d+\.(gate_proj|down_proj)$",
        r"+:^(.*\.)?layers\.1\.mlp\.experts$",
    ]
    assert rule(entry, "model.layers.1.mlp.experts") == "+:{'bits': 8, 'group_size': 64}"
    assert rule(entry, "model.layers.2.mlp.experts.1.down_proj") is None


def test_the_scheme_of_most_linears_is_the_base() -> None:
    schemes = dict.fromkeys(("a.0.x", "a.1.x", "a.2.x"), EIGHT) | {"a.3.x": FOUR}
    entry = FORMATS["gptq"].entry(ModuleSchemes(schemes, ()))
    assert (entry["bits"], entry["group_size"]) == (8, 64)
    assert rule(entry, "a.3.x") == "+:{'bits': 4, 'group_size': 128}"
