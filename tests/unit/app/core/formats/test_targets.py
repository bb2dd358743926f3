"""Patterns of module names: few, and matching exactly what is meant."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.formats.targets import compact_patterns, exact, matched

DENSE = [f"model.layers.{layer}.{name}" for layer in range(12) for name in (
    "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
)]  # fmt: skip
EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{name}"
    for layer in range(3)
    for expert in range(11)
    for name in ("up_proj", "down_proj")
]


def test_one_linear_of_all_layers_is_one_pattern() -> None:
    wanted = [name for name in DENSE if name.endswith("down_proj")]
    assert compact_patterns(wanted, DENSE) == [r"^(.*\.)?layers\.\d+\.mlp\.down_proj$"]


def test_some_layers_are_listed() -> None:
    wanted = ["model.layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj", "model.layers.3.mlp.gate_proj"]
    assert compact_patterns(wanted, DENSE) == [
        r"^(.*\.)?layers\.(1|11)\.mlp\.down_proj$", r"^(.*\.)?layers\.3\.mlp\.gate_proj$"
    ]  # fmt: skip


def test_all_experts_of_some_layers_are_one_pattern() -> None:
    wanted = [name for name in EXPERTS if name.endswith("up_proj") and ".layers.2." in name]
    assert compact_patterns(wanted, EXPERTS) == [r"^(.*\.)?layers\.2\.mlp\.experts\.\d+\.up_proj$"]


def test_linears_of_one_module_with_the_same_numbers_share_a_pattern() -> None:
    wanted = [name for name in DENSE if "self_attn" in name and ".3." in name]
    assert compact_patterns(wanted, DENSE) == [r"^(.*\.)?layers\.3\.self_attn\.(q_proj|o_proj)$"]


def test_numbers_without_a_rule_are_named_one_by_one() -> None:
    wanted = ["model.layers.0.mlp.experts.1.up_proj", "model.layers.1.mlp.experts.0.up_proj"]
    assert compact_patterns(wanted, EXPERTS) == [exact(name) for name in wanted]


def test_names_without_numbers_and_dots_that_are_not_any_character() -> None:
    names = ["lm_head", "lm_headx", "a.b", "aXb"]
    assert compact_patterns(["lm_head", "a.b"], names) == [r"^(.*\.)?lm_head$", r"^(.*\.)?a\.b$"]


def test_layers_are_matched_in_whatever_modules_servers_put_them() -> None:
    pattern = compact_patterns([name for name in DENSE if name.endswith("down_proj")], DENSE)
    servers = [name.replace("model.", "language_model.model.") for name in DENSE]
    assert matched(pattern, servers) == {name for name in servers if name.endswith("down_proj")}


def test_of_two_stacks_of_layers_a_pattern_names_all_that_comes_before() -> None:
    names = [f"model.{stack}.layers.{layer}.fc1" for stack in ("encoder", "decoder") for layer in range(3)]
    assert compact_patterns(names[3:], names) == [r"^model\.decoder\.layers\.\d+\.fc1$"]


@given(st.sampled_from([DENSE, EXPERTS, DENSE + EXPERTS]), st.data())
@settings(max_examples=60, deadline=None)
def test_patterns_match_what_is_meant_and_nothing_else(names: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names)))
    patterns = compact_patterns(wanted, names)
    assert matched(patterns, names) == set(wanted)
    assert len(patterns) <= len(wanted)


@given(st.sets(st.integers(0, 11), min_size=1), st.sets(st.integers(0, 3), min_size=1))
@settings(max_examples=40, deadline=None)
def test_whole_layers_need_one_pattern_for_each_module_of_linears(layers: set[int], kinds: set[int]) -> None:
    wanted = [DENSE[4 * layer + kind] for layer in sorted(layers) for kind in sorted(kinds)]
    assert len(compact_patterns(wanted, DENSE)) == len({kind // 2 for kind in kinds})  # attention, mlp
