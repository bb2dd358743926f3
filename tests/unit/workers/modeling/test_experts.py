"""Fused experts of transformers as linears: the same sum, for every form that it has."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.core.planning.family import Experts
from workers.modeling.experts import SplitExperts, experts_of, split_experts

HIDDEN, INNER, EXPERTS, TOKENS, CHOSEN = 24, 40, 5, 33, 2
NAMES = Experts(module="experts", gate="gate_proj", up="up_proj", down="down_proj")
UNGATED = NAMES.model_copy(update={"gate": ""})
FAMILIES = (
    "afmoe", "aria", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe",
    "exaone_moe", "gemma4", "glm4_moe", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoehybrid",
    "hunyuan_v1_moe", "jamba", "kimi_linear", "lfm2_moe", "llama4", "longcat_flash", "minimax",
    "minimax_m2", "minimax_m3_vl", "mistral4", "mixtral", "muse_spark", "nemotron_h", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
)  # fmt: skip


class Sizes:
    """Stands for every family's config: sizes, an activation and its limits, under many names."""

    _experts_implementation = "eager"
    moe_latent_size = None

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if "zero_expert" in name:
            return 2
        if "expert" in name and "intermediate" not in name and "hidden" not in name:
            return EXPERTS
        if "act" in name:
            return "relu2" if name == "mlp_hidden_act" else "silu"
        if "limit" in name or "alpha" in name:
            return 0.7  # low enough to clamp
        if "eps" in name:
            return 1e-6
        return INNER if "intermediate" in name or "expert" in name else HIDDEN


def fused_experts(family: str) -> nn.Module:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    classes: list[Any] = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and name.endswith("Experts") and value.__module__ == module.__name__
    ]
    generator = torch.Generator().manual_seed(3)
    assert len(classes) == 1
    experts: nn.Module = classes[0](Sizes())
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return experts.eval()


def called(experts: nn.Module, sorted_input: bool, choices: int = EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = torch.rand(TOKENS, choices, generator=generator)
    weights, chosen = scores.topk(CHOSEN)
    arguments: tuple[Tensor, ...]
    if sorted_input:
        routed = torch.zeros_like(scores).scatter(1, chosen, weights).T  # (experts, tokens)
        arguments = ((states * routed[..., None]).reshape(-1, HIDDEN),)
    else:
        arguments = (states, chosen, weights)
    output: Tensor = experts(*arguments)
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_split_experts_compute_what_the_fused_ones_do(family: str) -> None:
    layer = nn.Module()
    layer.experts = fused_experts(family)
    form = experts_of(layer.experts)
    assert form is not None
    assert (form.count, form.hidden, form.inner) == (EXPERTS, HIDDEN, INNER)
    choices = EXPERTS + 2 * form.identities
    with torch.no_grad():
        expected = called(layer.experts, form.sorted_input, choices)
        split_experts(layer, NAMES if form.gated else UNGATED)
        assert isinstance(layer.experts, SplitExperts)
        result = called(layer.experts, form.sorted_input, choices)
    assert float((result - expected).norm() / expected.norm()) <= 1e-6
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    projections = ("gate_proj", "up_proj", "down_proj")[0 if form.gated else 1 :]
    assert linears == {f"experts.{number}.{name}" for number in range(EXPERTS) for name in projections}


def test_other_modules_are_no_experts() -> None:
    assert experts_of(nn.Linear(4, 4)) is None
    dense = nn.Module()
    dense.up_proj, dense.down_proj, dense.act_fn = nn.Linear(4, 8), nn.Linear(8, 4), nn.SiLU()
    assert experts_of(dense) is None
    shared = import_module("transformers.models.inkling.modeling_inkling").InklingSharedExperts(Sizes())
    assert experts_of(shared) is None  # a third tensor, gate_proj: not one of the known forms
    layer = nn.Module()
    layer.experts = shared
    with pytest.raises(ValueError, match="InklingSharedExperts"):
        split_experts(layer, NAMES)


def test_a_fused_module_keeps_no_weights_beside_the_split_ones() -> None:
    layer = nn.Module()
    layer.experts = fused = fused_experts("gpt_oss")
    split_experts(layer, NAMES)
    assert not list(fused.parameters())
    assert sum(each.numel() for each in layer.parameters()) == EXPERTS * (
        3 * HIDDEN * INNER + 2 * INNER + HIDDEN
    )
