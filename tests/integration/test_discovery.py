"""Groups of linears that tracing finds: those of a table that was written by hand; a wrong one can't pass."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from app.core.errors import ModelRefused
from app.core.planning.family import FAMILIES, Family, ScaleGroup, known_family, known_types
from workers.discovery import random_weights, smooth_layers
from workers.discovery.__main__ import all_types, written
from workers.discovery.family_discovery import discover, discover_type
from workers.discovery.layer_tracing import find_layers, logits_of, some_ids, traced_layers
from workers.discovery.random_weights import tiny_model
from workers.discovery.shrunk_config import fewest_sharing
from workers.discovery.smooth_layers import LayerProbe, layer_groups

GOLDEN = Path(__file__).parents[1] / "golden"
HAND_WRITTEN = json.loads((GOLDEN / "hand_written_groups.json").read_text("utf-8"))
REFUSED = json.loads((GOLDEN / "refused_types.json").read_text("utf-8"))  # of transformers 5.24, with reasons
SAMPLE = ("gemma2", "gpt_oss", "llama4", "mixtral", "nemotron_h", "qwen3_5")


def groups_by_linears(family: Family) -> dict[frozenset[str], list[dict[str, Any]]]:
    """Each kind's groups as JSON has them, without the words of a reason."""
    return {
        frozenset(kind.linears): [
            json.loads(group.model_copy(update={"unscaled": None}).model_dump_json(exclude_defaults=True))
            for group in kind.groups
        ]
        for kind in family.kinds
    }


def corrected(model_type: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group that was written by hand, as it is right.

    gpt_neox adds attention and MLP to the stream side by side, so both join the layer's output. No OPT model
    has fewer key/value heads than heads.
    """
    if model_type == "gpt_neox" and group["balance_layers"] == ["attention.dense"]:
        return {**group, "joins": "output"}
    if model_type == "opt":
        return {key: value for key, value in group.items() if key != "repeats_heads"}
    return group


@pytest.mark.parametrize("model_type", sorted(HAND_WRITTEN))
def test_groups_are_those_that_were_written_by_hand(model_type: str) -> None:
    family = known_family(model_type)
    assert family is not None
    found = groups_by_linears(family)
    for groups in HAND_WRITTEN[model_type]:
        linears = frozenset(name for group in groups for name in group["balance_layers"])
        assert found.pop(linears) == [corrected(model_type, group) for group in groups]
    assert not found


@pytest.mark.parametrize(
    "model_type", sorted(known_types()) if os.environ.get("FAMILIES") == "all" else SAMPLE
)
def test_the_file_of_a_family_is_what_tracing_finds(model_type: str) -> None:
    assert written(discover_type(model_type)) == (FAMILIES / f"{model_type}.json").read_text("utf-8")


@pytest.mark.parametrize("model_type", sorted(known_types()))
def test_no_name_of_a_family_is_of_one_expert(model_type: str) -> None:
    """Where a type's default has a single expert, its tensor has the values of all of them."""
    written_family = (FAMILIES / f"{model_type}.json").read_text("utf-8")
    assert re.search(r"experts\.\d", written_family) is None


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [("llama", 2), ("qwen3_5", 5), ("jamba", 6), ("lfm2", 2), ("gemma4", 4), ("gemma3n_text", 6)],
)
def test_few_layers_are_built(model_type: str, layers: int) -> None:
    """The work of tracing grows with them; defaults have 24 and more."""
    with torch.no_grad():
        model = tiny_model({"model_type": model_type})
        assert len(traced_layers(model, find_layers(model))) == layers


def test_layers_that_read_others_values_are_shrunk_with_those_that_are_read() -> None:
    types = [*["sliding_attention"] * 5, "full_attention"] * 4
    values = {
        "num_hidden_layers": 24, "num_kv_shared_layers": 8, "layer_types": types,
        "sizes": list(range(24)), "per_layer_config": {"5": "a", "17": "b", "3": "c"},
    }  # fmt: skip
    assert fewest_sharing(values) == {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": [types[number] for number in (0, 5, 11, 15, 16, 17)],
        "sizes": [0, 5, 11, 15, 16, 17],
        "per_layer_config": {1: "a", 5: "b"},
    }
    assert fewest_sharing({"num_hidden_layers": 24, "layer_types": types}) == {
        "num_hidden_layers": 24,
        "layer_types": types,
    }


def test_every_type_of_transformers_is_known_or_has_a_reason() -> None:
    assert not known_types() & REFUSED.keys()
    if transformers.__version__.startswith("5.24."):
        assert known_types() | REFUSED.keys() == set(all_types())


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "hrm_text"])
def test_a_refused_type_says_why(model_type: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        discover_type(model_type)
    assert refusal.value.message == REFUSED[model_type]


def probed(model_type: str, **settings: object) -> LayerProbe:
    with torch.no_grad():
        model = tiny_model({"model_type": model_type, **settings})
        layer = traced_layers(model, find_layers(model))[0]
        return LayerProbe(layer.module, layer.call, model.config.to_dict())


def group_of(probe: LayerProbe, linear: str) -> ScaleGroup:
    with torch.no_grad():
        return next(group for group in layer_groups(probe) if linear in group.balance_layers)


@pytest.mark.parametrize(
    ("model_type", "linear", "corruption"),
    [
        ("llama", "self_attn.q_proj", {"smooth_kind": "offset norm"}),
        ("llama", "self_attn.q_proj", {"smooth_layer": "post_attention_layernorm"}),
        ("llama", "self_attn.q_proj", {"balance_layers": ("self_attn.q_proj", "self_attn.k_proj")}),
        ("llama", "self_attn.o_proj", {"repeats_heads": False}),
        ("llama", "self_attn.o_proj", {"smooth_layer": "self_attn.k_proj"}),
        ("llama", "mlp.down_proj", {"smooth_layer": "mlp.gate_proj"}),
        ("gemma2", "mlp.up_proj", {"smooth_kind": "norm"}),
        ("gpt_neox", "attention.dense", {"smooth_rows": "first of each head"}),
        ("gpt_neox", "attention.dense", {"smooth_rows": "last"}),
        ("phi3", "mlp.down_proj", {"smooth_rows": "block", "block": (0, 2)}),
        ("qwen3_5", "linear_attn.in_proj_qkv", {"compensated": ()}),
    ],
)
@torch.no_grad()
def test_a_wrong_fold_is_refused(model_type: str, linear: str, corruption: dict[str, object]) -> None:
    probe = probed(model_type)
    right = group_of(probe, linear)
    assert right.smooth_layer is not None
    assert probe.holds([right])
    assert not probe.holds([right.model_copy(update=corruption)])


def another_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.quantization.folding.offset_of", lambda group: 0.5)


def no_shared_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = smooth_layers.row_patterns

    def without(*arguments: Any) -> Any:
        return ({**each, "repeats_heads": False} for each in patterns(*arguments))

    monkeypatch.setattr(smooth_layers, "row_patterns", without)


@pytest.mark.parametrize(
    ("corrupt", "linear"), [(another_offset, "self_attn.q_proj"), (no_shared_heads, "self_attn.o_proj")]
)
@torch.no_grad()
def test_a_corrupt_finder_finds_nothing_rather_than_a_wrong_fold(
    corrupt: Callable[[pytest.MonkeyPatch], None], linear: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = probed("llama")
    assert group_of(probe, linear).smooth_layer is not None
    corrupt(monkeypatch)
    assert group_of(probe, linear).smooth_layer is None


def test_a_router_that_reads_the_group_is_compensated() -> None:
    family = known_family("qwen3_5_moe")
    assert family is not None
    group = next(g for g in family.kinds[0].groups if "mlp.experts.{expert}.up_proj" in g.balance_layers)
    assert set(group.compensated) == {"mlp.gate", "mlp.shared_expert_gate"}
    assert group.observed == group.compensated[0]


def test_a_layer_that_draws_random_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: nn.functional.dropout(forward(self, x), 0.5))
    with pytest.raises(ModelRefused, match="not repeatable") as refusal:
        discover({"model_type": "llama"})
    assert refusal.value.code == "architecture_unsupported"


def test_a_forward_pass_without_layers_is_refused() -> None:
    model = tiny_model({"model_type": "llama"})
    model.model.layers = nn.Sequential(*model.model.layers)  # type: ignore[union-attr] # a decoder of Llama's
    with torch.no_grad(), pytest.raises(ModelRefused, match="no list of layers"):
        find_layers(model)


def test_layers_that_share_their_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model({"model_type": "llama"})
    model.model.layers[1] = model.model.layers[0]  # type: ignore[union-attr, index, operator]
    with torch.no_grad(), pytest.raises(ModelRefused, match="not called once each"):
        traced_layers(model, find_layers(model))


def test_a_class_that_needs_an_absent_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class StandIn:
        """As transformers has it for a class whose package is absent."""

        _backends = ("timm",)

    # Where it is looked up, and alone: behind other files' tests another class was found.
    monkeypatch.setattr(random_weights.transformers, "LlamaForCausalLM", StandIn)
    monkeypatch.setattr(random_weights, "text_classes", lambda _model_type: ["LlamaForCausalLM"])
    with pytest.raises(ModelRefused, match="needs a package that is absent: timm"):
        discover({"model_type": "llama"})


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ModelRefused, match="no class that gives llama text"):
        discover({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})


def test_tracing_runs_on_one_thread_and_leaves_the_job_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other at matrices this small took four times the processor time."""
    seen: list[int] = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: seen.append(torch.get_num_threads()) or forward(self, x)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        discover({"model_type": "llama"})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_a_tower_that_checkpoints_call_otherwise_is_named() -> None:
    """transformers asks for it by its own name, and files have another."""
    for model_type, towers in (("hunyuan_vl", ("vision_tower",)), ("gemma3", ()), ("llama", ())):
        family = known_family(model_type)
        assert family is not None
        assert family.towers == towers


def test_settings_of_a_job_count() -> None:
    gelu = discover({"model_type": "opt", "activation_function": "gelu"})
    relu = known_family("opt")
    assert relu is not None
    assert gelu.settings["activation_function"] == "gelu"
    down, straight = (family.kinds[0].groups[-1] for family in (gelu, relu))
    assert down.unscaled is not None
    assert straight.smooth_layer == "fc1"


def test_the_tiny_model_is_a_causal_model_with_random_norms() -> None:
    model: PreTrainedModel = tiny_model({"model_type": "llama"})
    assert isinstance(model, LlamaForCausalLM)
    assert model.model.norm.weight.std() > 0.1
    with torch.no_grad():
        assert logits_of(model, some_ids()).shape == (1, 24, model.config.vocab_size)
