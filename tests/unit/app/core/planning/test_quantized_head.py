"""A head that a recipe's `ignore` does not name is one more linear of the plan."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import RecipeUnsupported
from app.core.formats.registry import FORMATS, FormatName
from app.core.planning.architectures import HeadStep
from app.core.planning.plan import CandidatePlan, Plan, plan_job
from app.core.records.specs import JobSpec
from app.core.sources.safetensors_header import TensorHeader
from tests.unit.app.core.planning.headers import CONFIG, asked, header, tensors

VOCABULARY = 4096


def untied(spec: JobSpec, head: TensorHeader | None = None, name: str = "lm_head", **config: Any) -> Plan:
    headers = tensors(**{f"{name}.weight": head or header((VOCABULARY, 192))})
    return plan_job(spec, {**CONFIG, "tie_word_embeddings": False, **config}, headers)


def head_of(candidate: CandidatePlan) -> Any:
    return next((linear for linear in candidate.linears if linear.name == candidate.head), None)


def test_a_head_is_quantized_where_ignore_does_not_name_it() -> None:
    plan, usual = untied(asked(ignore=[])), untied(asked())
    candidate, other = plan.candidates[0], usual.candidates[0]
    assert (candidate.head, other.head) == ("lm_head", None)
    assert head_of(candidate).scheme == candidate.linears[0].scheme
    assert plan.architecture.head_step == HeadStep(number=2, linear="lm_head")
    assert (plan.steps, usual.steps) == (3, 2)
    assert "lm_head" not in candidate.full_precision
    assert "lm_head" in other.full_precision
    weights = VOCABULARY * 192
    saved = other.output_bytes["compressed-tensors"] - candidate.output_bytes["compressed-tensors"]
    groups = weights // 64
    assert saved == 2 * weights - (weights // 2 + 2 * groups + groups // 2 + 16)
    assert plan.notes == ("recipe 0: lm_head is quantized too, as `ignore` does not name it",)
    assert usual.notes == ()
    assert plan.layer_bytes == 2 * weights > usual.layer_bytes


def test_one_recipe_of_a_job_takes_the_head_and_another_does_not() -> None:
    spec = asked()
    (recipe,) = spec.recipes
    both = JobSpec.model_validate(
        {**spec.model_dump(), "recipe": [recipe.model_dump(), {**recipe.model_dump(), "ignore": []}]}
    )
    first, second = untied(both).candidates
    assert (first.head, second.head) == (None, "lm_head")
    assert first == untied(spec).candidates[0]
    assert [each.name for each in second.linears] == [*(each.name for each in first.linears), "lm_head"]


@pytest.mark.parametrize("named", ["lm_head", "re:lm_.*"])
def test_overrides_count_for_the_head(named: str) -> None:
    plan = untied(asked(ignore=[], overrides=[{"match": named, "bits": 8, "group_size": 32}]))
    scheme = head_of(plan.candidates[0]).scheme
    assert (scheme.bits, scheme.group_size) == (8, 32)
    assert not any("matches no linear" in note for note in plan.notes)


def test_lm_head_stands_for_a_head_of_another_name() -> None:
    config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    layers = {
        f"gpt_neox.layers.{layer}.{name}.weight": header(shape)
        for layer in range(2)
        for name, shape in {
            "attention.query_key_value": (576, 192), "attention.dense": (192, 192),
            "mlp.dense_h_to_4h": (768, 192), "mlp.dense_4h_to_h": (192, 768),
        }.items()
    }  # fmt: skip
    headers = {**layers, "gpt_neox.embed_in.weight": header((VOCABULARY, 192))}
    headers["embed_out.weight"] = header((VOCABULARY, 192))
    body = {**CONFIG, **config, "tie_word_embeddings": False}
    usual = plan_job(asked(), body, headers)
    assert (usual.candidates[0].head, usual.notes) == (None, ())
    for ignore in ([], ["mlp.dense_4h_to_h"]):
        taken = plan_job(
            asked(ignore=ignore, overrides=[{"match": "lm_head", "bits": 8}]), body, headers
        ).candidates[0]
        assert taken.head == "embed_out"
        assert head_of(taken).scheme.bits == 8
    assert plan_job(asked(ignore=["embed_out"]), body, headers).candidates[0].head is None


def test_a_tied_head_keeps_its_precision_and_the_note_says_what_to_do() -> None:
    plan = plan_job(asked(ignore=[]), CONFIG, tensors())
    assert (plan.candidates[0].head, plan.steps) == (None, 2)
    assert plan.notes == (
        "recipe 0: lm_head keeps its precision although `ignore` does not name it: its weights are the "
        "embedding's (tie_word_embeddings); to quantize it, save the model with a copy of them as "
        "lm_head.weight and tie_word_embeddings false",
    )
    copied = plan_job(asked(ignore=[]), CONFIG, tensors(**{"lm_head.weight": header((VOCABULARY, 192))}))
    assert copied.candidates[0].head is None  # loaders tie it, whatever the files have


@pytest.mark.parametrize(
    ("recipe", "formats", "code", "words"),
    [
        ({"scheme": "fp8"}, (), "head_unsupported", "lm_head would get the scheme fp8"),
        (
            {"symmetric": True},
            ("gptq",),
            "format_cannot_hold_recipe",
            "out_features=1000 is not a multiple of 32",
        ),
        ({"group_size": 128}, (), "group_size_indivisible", "in_features=192"),
    ],
)
def test_a_head_that_cannot_be_quantized_is_refused(
    recipe: dict[str, Any], formats: tuple[FormatName, ...], code: str, words: str
) -> None:
    body = {"ignore": ["re:.*layers.*down_proj"], **recipe}
    if "scheme" in body:
        body = {"group_size": "auto", **body}
    if code == "group_size_indivisible":
        body["ignore"] = ["re:.*layers.*"]
    with pytest.raises(RecipeUnsupported, match=words) as refusal:
        untied(asked(*formats, **body), header((1000, 192)))
    assert refusal.value.code == code
    assert refusal.value.remedy


def test_a_head_that_is_no_matrix_of_weights_is_refused() -> None:
    with pytest.raises(RecipeUnsupported, match=r"lm_head.weight is F8_E4M3") as refusal:
        untied(asked(ignore=[]), header((VOCABULARY, 192), "F8_E4M3"))
    assert refusal.value.code == "weights_unsupported"


def test_formats_name_the_head() -> None:
    asymmetric, symmetric = untied(asked(ignore=[])), untied(asked(ignore=[], symmetric=True))
    entry = FORMATS["compressed-tensors"].entry(asymmetric.candidates[0].modules)
    assert entry["ignore"] == []
    assert entry["config_groups"]["group_0"]["targets"] == ["Linear", r"re:(.*\.)?lm_head$"]
    assert FORMATS["awq"].entry(asymmetric.candidates[0].modules)["lm_head"] is True
    assert FORMATS["gptq"].entry(symmetric.candidates[0].modules)["lm_head"] is True
    plain = untied(asked())
    assert "lm_head" not in FORMATS["awq"].entry(plain.candidates[0].modules)
    assert FORMATS["gptq"].entry(untied(asked(symmetric=True)).candidates[0].modules)["lm_head"] is False


def test_a_head_of_its_own_scheme_has_a_target_of_its_own() -> None:
    plan = untied(asked(ignore=[], overrides=[{"match": "lm_head", "bits": 8}]))
    groups = FORMATS["compressed-tensors"].entry(plan.candidates[0].modules)["config_groups"]
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in groups.values()}
    assert by_bits[8] == [r"re:(.*\.)?lm_head$"]
    assert not any("lm_head" in target for target in by_bits[4])
