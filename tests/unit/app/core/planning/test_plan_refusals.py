"""What a plan refuses: every refusal names the nearest choice."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import ModelRefused, NibbleError, RecipeUnsupported
from app.core.planning.architectures import architecture_of
from app.core.planning.plan import plan_job, refuse_without_head, window_notes
from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec
from app.core.sources.safetensors_header import TensorHeader
from tests.unit.app.core.planning.headers import CONFIG, asked, header, planned, tensors


def refused(kind: type[NibbleError], spec: JobSpec | None = None, **config: object) -> NibbleError:
    with pytest.raises(kind) as refusal:
        planned(spec, config)
    assert refusal.value.remedy
    return refusal.value


@pytest.mark.parametrize("changes", [
    {"model_type": "no_such_type", "architectures": ["NoSuchForCausalLM"]},
    {"model_type": None},
    {"model_type": ["llama"]},
    {"model_type": "../llama"},
])  # fmt: skip
def test_an_unknown_architecture_is_refused_with_the_list(changes: dict[str, object]) -> None:
    error = refused(ModelRefused, **changes)
    assert error.code == "architecture_unsupported"
    assert ", llama, " in error.remedy
    assert str(changes["model_type"]) in error.message


def test_another_class_of_a_known_type_is_refused_with_the_one_that_is_taken() -> None:
    error = refused(ModelRefused, architectures=["LlamaForSequenceClassification"])
    assert error.code == "architecture_unsupported"
    assert "LlamaForSequenceClassification" in error.message
    assert "LlamaForCausalLM" in error.remedy


UNKNOWN = {"model_type": "gpt_j", "architectures": ["SomeForCausalLM"]}


def test_a_type_that_transformers_has_is_planned_by_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.planning.family_choice.transformers_has", lambda _: True)
    plan = planned(config=UNKNOWN)
    names = {linear.name for linear in plan.candidates[0].linears}
    assert names == {name.removesuffix(".weight") for name in tensors() if "_proj" in name}
    assert any("found when the job starts" in note for note in plan.notes)
    with pytest.raises(RecipeUnsupported, match="would get different schemes, but servers fuse them"):
        planned(asked(overrides=[{"match": "re:.*q_proj", "bits": 8}]), UNKNOWN)
    with pytest.raises(ModelRefused) as refusal:
        plan_job(asked(), {**CONFIG, **UNKNOWN}, {"model.embed_tokens.weight": header((1000, 192))})
    assert refusal.value.code == "architecture_unsupported"


def test_under_such_a_setting_the_layers_may_have_other_linears() -> None:
    names = {key.replace("gate_proj", "gate_up_proj"): value for key, value in tensors().items()}
    names = {key: value for key, value in names.items() if ".up_proj" not in key}
    with pytest.raises(ModelRefused, match=r"gate_proj\.weight is missing"):
        plan_job(asked(), CONFIG, names)
    plan = plan_job(asked(), {**CONFIG, "attention_bias": True}, names)
    planned_linears = {linear.name for linear in plan.candidates[0].linears}
    assert "model.layers.0.mlp.gate_up_proj" in planned_linears
    assert any("attention_bias is True" in note for note in plan.notes)


def test_a_setting_under_which_nothing_was_traced_leaves_the_groups_open() -> None:
    traced = {"model_type": "opt", "activation_function": "relu"}
    assert architecture_of(traced, {}).to_find is None
    assert architecture_of({"model_type": "opt"}, {}).to_find is None
    to_find = architecture_of({**traced, "activation_function": "gelu"}, {}).to_find
    assert to_find is not None
    assert "activation_function is 'gelu'" in to_find


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "2", True, 1.5])
def test_a_config_with_impossible_numbers_is_refused(key: str, value: object) -> None:
    error = refused(ModelRefused, **{key: value})
    assert error.code == "config_invalid"
    assert key in error.message


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (None, "weights_missing"),
        (header((320, 192, 1)), "weights_unsupported"),
        (header((320, 0)), "weights_unsupported"),
        (header((320, 192), "I32"), "weights_unsupported"),
        (header((320, 192), "F32"), "weights_unsupported"),  # the others are bfloat16
    ],
)
def test_weights_that_are_missing_or_unknown_are_refused(found: TensorHeader | None, code: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    headers = {key: value for key, value in tensors().items() if key != name}
    if found is not None:
        headers[name] = found
    with pytest.raises(ModelRefused) as refusal:
        plan_job(asked(), CONFIG, headers)
    assert refusal.value.code == code


def test_a_head_without_weights_is_refused_unless_it_is_tied() -> None:
    for tied in ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}):
        error = refused(ModelRefused, **tied)
        assert error.code == "weights_missing"
        assert error.message.startswith("lm_head.weight is missing")
        assert "tie_word_embeddings" in error.remedy
        plan_job(asked(), {**CONFIG, **tied}, tensors(**{"lm_head.weight": header((1000, 192))}))
    silent = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    with pytest.raises(ModelRefused, match="the default of llama"):
        plan_job(asked(), silent, tensors())
    plan_job(asked(), {**silent, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, tensors())


def test_a_head_is_known_by_its_other_name() -> None:
    with_head = {"embed_out.weight": header((1000, 192))}
    without = {"gpt_neox.embed_in.weight": header((1000, 192))}
    refuse_without_head(architecture_of({"model_type": "gpt_neox"}, with_head), with_head)
    with pytest.raises(ModelRefused, match=r"^lm_head\.weight or embed_out\.weight is missing"):
        refuse_without_head(architecture_of({"model_type": "gpt_neox"}, without), without)


def test_a_claim_of_more_layers_than_there_are_is_refused_at_once() -> None:
    error = refused(ModelRefused, num_hidden_layers=10**9)
    assert error.code == "weights_missing"
    assert "model.layers.2." in error.message


@pytest.mark.parametrize(
    ("columns", "remedy"), [(192, "use group_size 64"), (96, "use group_size 32"), (40, "group_size -1")]
)
def test_groups_that_do_not_divide_are_refused_with_the_nearest(columns: int, remedy: str) -> None:
    headers = {
        name: header((value.shape[0], columns)) if "_proj" in name else value
        for name, value in tensors().items()
    }
    with pytest.raises(RecipeUnsupported, match=f"in_features={columns} is not a multiple") as refusal:
        plan_job(asked(group_size=128), CONFIG, headers)
    assert refusal.value.code == "group_size_indivisible"
    assert remedy in refusal.value.remedy
    assert refusal.value.param == "recipe.group_size"


def test_without_a_group_size_and_any_that_divides_the_way_out_is_named() -> None:
    headers = {
        name: header((value.shape[0], 40)) if "down_proj" in name else value
        for name, value in tensors().items()
    }
    with pytest.raises(RecipeUnsupported, match="down_proj: in_features=40 is not a multiple") as refusal:
        plan_job(asked(group_size="auto"), CONFIG, headers)
    assert "use group_size -1, or add 'down_proj' to `ignore`" in refusal.value.remedy


@pytest.mark.parametrize(("choice", "size"), [("nearest", 64), ("skip", None)])
def test_groups_that_do_not_divide_become_smaller_or_none(choice: str, size: int | None) -> None:
    recipe = {"group_size": 128, "indivisible": choice}
    headers = tensors(**{
        f"model.layers.{layer}.mlp.down_proj.weight": header((192, 384)) for layer in range(2)
    })  # fmt: skip
    plan = plan_job(asked(**recipe), CONFIG, headers)
    assert sum("12 linears get other groups or none" in note for note in plan.notes) == 1
    candidate = plan.candidates[0]
    for linear in candidate.linears:
        if linear.name.endswith("down_proj"):
            assert (linear.scheme and linear.scheme.group_size, linear.reason) == (128, None)
        else:
            assert (linear.scheme and linear.scheme.group_size) == size
            kept = "kept" if size is None else "group_size 64"
            assert linear.reason == f"{kept}: in_features=192 is not a multiple of group_size=128"


def test_formats_of_one_scheme_refuse_the_mixture_and_hold_one_other_size() -> None:
    mixed = tensors(**{
        f"model.layers.{layer}.mlp.down_proj.weight": header((192, 384)) for layer in range(2)
    })  # fmt: skip
    spec = asked("awq", group_size=128, indivisible="nearest")
    with pytest.raises(RecipeUnsupported, match="holds one bit width and group size"):
        plan_job(spec, CONFIG, mixed)
    schemes = {linear.scheme for linear in plan_job(spec, CONFIG, tensors()).candidates[0].linears}
    assert {scheme and scheme.group_size for scheme in schemes} == {64}


def test_a_fused_set_takes_one_size() -> None:
    """Experts' gate and up read 192 channels, down reads 96: only 32 divides both."""
    config = {
        **CONFIG, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2,
    }  # fmt: skip
    headers = {name: value for name, value in tensors().items() if ".mlp." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe."
        headers[prefix + "gate.weight"] = header((2, 192))
        for expert in range(2):
            names = {"w1": (96, 192), "w3": (96, 192), "w2": (192, 96)}
            headers |= {f"{prefix}experts.{expert}.{n}.weight": header(shape) for n, shape in names.items()}
    candidate = plan_job(asked(group_size=128, indivisible="nearest"), config, headers).candidates[0]
    sizes = {linear.name: linear.scheme and linear.scheme.group_size for linear in candidate.linears}
    assert {size for name, size in sizes.items() if "experts" in name} == {32}
    assert {size for name, size in sizes.items() if "self_attn" in name} == {64}
    assert len(candidate.linears) == 2 * (4 + 6)
    for count in (0, "two", 10**9):
        with pytest.raises(ModelRefused) as refusal:
            plan_job(asked(), {**config, "num_local_experts": count}, headers)
        assert refusal.value.code == "config_invalid"


@pytest.mark.parametrize(
    ("recipe", "nearest"),
    [
        ({"bits": 3}, "bits 4"),
        ({"symmetric": True}, "symmetric false"),
        ({"group_size": -1}, "group_size 128"),
        ({"overrides": [{"match": "down_proj", "bits": 8}]}, "compressed-tensors"),
        ({"overrides": [{"match": "re:.*", "bits": 8}]}, "bits 4"),
        ({"overrides": [{"match": "re:.*", "group_size": -1}]}, "group_size 128"),
    ],
)
def test_what_awq_cannot_hold_is_refused_with_the_nearest(recipe: dict[str, Any], nearest: str) -> None:
    error = refused(RecipeUnsupported, asked("compressed-tensors", "awq", **recipe))
    assert error.code == "format_cannot_hold_recipe"
    assert error.param == "formats"
    assert nearest in error.remedy
    planned(asked("compressed-tensors", **recipe))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_symmetric(bits: int) -> None:
    error = refused(RecipeUnsupported, asked("compressed-tensors", "gptq", bits=bits))
    assert error.code == "format_cannot_hold_recipe"
    assert error.param == "formats"
    assert "gptq holds symmetric grids only" in error.message
    assert error.remedy == "nearest valid choice: symmetric true"
    planned(asked("compressed-tensors", "gptq", bits=bits, symmetric=True))


def test_gptq_holds_several_schemes() -> None:
    override = {"match": "down_proj", "bits": 8, "group_size": -1}
    assert planned(asked("gptq", symmetric=True, overrides=[override])).notes == ()


@pytest.mark.parametrize(
    ("shape", "why"),
    [((328, 192), "out_features=328 is not a multiple of 32"), ((320, 200), "in_features=200 is not a mul")],
)
def test_gptq_needs_rows_and_columns_in_thirty_twos(shape: tuple[int, int], why: str) -> None:
    headers = tensors(**{"model.layers.1.mlp.up_proj.weight": header(shape)})
    recipe = {"symmetric": True, "group_size": -1}
    with pytest.raises(RecipeUnsupported, match=why) as refusal:
        plan_job(asked("gptq", **recipe), CONFIG, headers)
    assert refusal.value.code == "format_cannot_hold_recipe"
    assert "compressed-tensors" in refusal.value.remedy
    kept = {"ignore": [r"re:.*\.1\.mlp\.(gate|up)_proj"], **recipe}
    plan_job(asked("gptq", **kept), CONFIG, headers)
    plan_job(asked(**recipe), CONFIG, headers)


def test_a_recipe_that_suits_no_two_formats_is_refused() -> None:
    for symmetric, format_name in ((True, "awq"), (False, "gptq")):
        error = refused(RecipeUnsupported, asked("awq", "gptq", symmetric=symmetric))
        assert f"the format {format_name} " in error.message


def test_awq_needs_rows_in_eights() -> None:
    headers = tensors()
    for layer in range(2):
        headers[f"model.layers.{layer}.mlp.gate_proj.weight"] = header((324, 192))
    with pytest.raises(RecipeUnsupported, match="out_features=324 is not a multiple of 8"):
        plan_job(asked("awq"), CONFIG, headers)
    plan_job(asked(), CONFIG, headers)


@pytest.mark.parametrize("recipe", [
    {"overrides": [{"match": "k_proj", "bits": 8}]},
    {"overrides": [{"match": r"re:.*\.1\.mlp\.up_proj", "group_size": 32}]},
    {"ignore": ["gate_proj"]},
    {"ignore": ["model.layers.0.self_attn.v_proj"]},
])  # fmt: skip
def test_splitting_a_fused_set_is_refused(recipe: dict[str, Any]) -> None:
    error = refused(RecipeUnsupported, asked(**recipe))
    assert error.code == "fused_set_split"
    assert "_proj" in error.remedy


def test_mixtures_of_one_recipe_have_labels_of_their_own() -> None:
    wider = [{"match": "re:.*mlp.*", "bits": bits} for bits in (2, 8)]
    labels = [planned(asked(overrides=(each,))).candidates[0].label for each in wider]
    assert planned(asked()).candidates[0].label == "awq w4 g64"
    assert all(label.startswith("awq w4 g64 mixed ") for label in labels)
    assert labels[0] != labels[1]


def test_whole_fused_sets_may_differ() -> None:
    recipe = {"overrides": [{"match": r"re:.*\.(gate|up)_proj", "bits": 8}]}
    schemes = {linear.scheme for linear in planned(asked(**recipe)).candidates[0].linears}
    assert {scheme.bits for scheme in schemes if scheme} == {4, 8}


def test_a_recipe_that_ignores_everything_is_refused() -> None:
    error = refused(RecipeUnsupported, asked(ignore=["re:.*_proj"]))
    assert error.code == "nothing_to_quantize"
    assert error.param == "recipe.ignore"


def test_the_second_recipe_is_checked_too() -> None:
    spec = JobSpec.model_validate(
        {"model": "m", "recipe": [{"group_size": 64}, {"group_size": 128}], "formats": ["awq"]}
    )
    assert refused(RecipeUnsupported, spec).param == "recipe.1.group_size"


def test_windows_beyond_the_models_positions() -> None:
    spec = asked().model_copy(update={"calibration": CalibrationSpec(sequence_length=64)})
    (note,) = planned(spec, {"max_position_embeddings": 32}).notes
    assert note.startswith("calibration windows of 64 tokens are longer than")
    assert planned(spec, {"max_position_embeddings": 64}).notes == ()
    own = asked().model_copy(
        update={
            "calibration": CalibrationSpec(sequence_length=32),
            "evaluation": EvaluationSpec(num_samples=128, sequence_length=48),
        }
    )
    (note,) = planned(own, {"max_position_embeddings": 32}).notes
    assert note.startswith("evaluation windows of 48 tokens are longer than")
    for each, section in ((spec, "calibration"), (own, "evaluation")):
        with pytest.raises(RecipeUnsupported) as refusal:
            list(
                window_notes(
                    each, architecture_of({"model_type": "opt"}, {}), {"max_position_embeddings": 32}
                )
            )
        assert (refusal.value.code, refusal.value.param) == (
            "sequence_too_long", f"{section}.sequence_length",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("evaluation", "raised"),
    [
        ({"num_samples": 7}, 8),
        ({"num_samples": 8}, None),
        ({"num_samples": 15, "sequence_length": 256}, 16),
        ({"num_samples": 16, "sequence_length": 256}, None),
    ],
)
def test_few_evaluation_tokens_have_a_note(evaluation: dict[str, int], raised: int | None) -> None:
    spec = asked().model_copy(update={"evaluation": EvaluationSpec.model_validate(evaluation)})
    notes = planned(spec).notes
    if raised is None:
        assert notes == ()
    else:
        assert [note.partition("raise ")[2] for note in notes] == [
            f"evaluation.num_samples to {raised} or more"
        ]


def test_fewer_calibration_tokens_than_inputs_have_a_note() -> None:
    """Plain rounding needs none."""
    calibration = CalibrationSpec(num_samples=1, sequence_length=8)
    update = {"calibration": calibration, "evaluation": EvaluationSpec(sequence_length=512)}
    (note,) = planned(asked().model_copy(update=update)).notes
    assert note.startswith("8 calibration tokens are fewer than the ")
    assert planned(asked(method="rtn").model_copy(update=update)).notes == ()
