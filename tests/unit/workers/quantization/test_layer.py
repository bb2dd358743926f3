"""A whole layer: folding keeps its function, AWQ earns its scales, the report tells what was done."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from app.core.errors import RecipeUnsupported
from app.core.formats.file_format import Scheme
from app.core.planning.architectures import architecture_of
from app.core.records.specs import Recipe, SearchSpec
from kernels.search.search_operators import clip_backend, search_backend
from tests.tiny_models import MODEL_TYPES, plant_outliers, random_model, save_model, some_tokens
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.modeling.layer_weights import Weights
from workers.quantization.calibration import CalibrationPass, equivalence_error
from workers.quantization.folding import Heads, fold_of, fold_scales
from workers.quantization.layer import LayerTask, quantize_layer
from workers.quantization.rounding import FoldedLinear, refuse_overflow
from workers.quantization.scale_search import ScaleChoice

CASES = {
    **{name: (name, {}) for name in MODEL_TYPES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped heads": ("llama", {"num_key_value_heads": 4}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
}


class LayerCase:
    """The first layer of a model, with its statistics and a window to compare outputs on."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        self.config = checkpoint.config
        architecture = architecture_of(self.config, checkpoint.tensors)
        decoder = Decoder(checkpoint, architecture, torch.device("cpu"), torch.float32)
        self.run = CalibrationPass(decoder, [some_tokens(4, 64, seed) for seed in range(2)])
        self.weights = {name: value.float() for name, value in decoder.layer_weights(0).items()}
        collected = self.run.collect(decoder.layer_weights(0))
        self.statistics, self.probe = collected.groups, collected.probe

    def task(self, recipe: Recipe, *, kept: tuple[str, ...] = (), **changes: object) -> LayerTask:
        architecture = self.run.decoder.architecture.at(0)
        scheme = Scheme(bits=recipe.bits, group_size=recipe.group_size, symmetric=recipe.symmetric)
        values = {
            "architecture": architecture,
            "recipe": recipe,
            "schemes": {name: scheme for name in architecture.linears if name not in kept},
            "heads": Heads.of(self.config),
            "weights": self.weights,
            "statistics": self.statistics,
            "dtype": torch.float32,
        }
        return LayerTask(**{**values, **changes})  # type: ignore[arg-type]

    def error(self, weights: Weights) -> float:
        """Relative error of the layer's output with other weights."""
        return equivalence_error(self.run, 0, weights, self.probe)


def layer_case(folder: Path, model_type: str = "llama", **changes: object) -> LayerCase:
    model = random_model(model_type, **changes)  # type: ignore[arg-type]
    plant_outliers(model)
    return LayerCase(save_model(model, folder))


def small(**changes: object) -> Recipe:
    return Recipe.model_validate({"group_size": 32, "search": SearchSpec(grid_points=8), **changes})


def random_choices(task: LayerTask) -> list[ScaleChoice]:
    """Scales from 1/4 to 4 for every group, shared between heads where they must be."""
    generator = torch.Generator().manual_seed(0)
    choices = []
    for group in task.architecture.groups:
        channels = task.weights[group.balance_layers[0] + ".weight"].shape[1]
        spec = fold_of(task.weights, task.heads, group, task.dtype)
        raw = 4 ** (2 * torch.rand(channels, generator=generator) - 1)
        choices.append(ScaleChoice(spec.spread(spec.shared(raw)), 0.5, 0.0, 0.0, 0.0))
    return choices


@pytest.mark.parametrize(("model_type", "changes"), CASES.values(), ids=list(CASES))
def test_folding_any_scales_keeps_the_function(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    case = layer_case(tmp_path, model_type, **changes)
    task = case.task(small())
    folded = fold_scales(task.weights, task.heads, task.architecture.groups, random_choices(task))
    changed = {name for name, value in folded.items() if not torch.equal(value, case.weights[name])}
    expected = {name + ".weight" for name in task.architecture.linears}
    expected |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    expected |= {name for name in case.weights if name in ("self_attn.v_proj.bias", "mlp.up_proj.bias")}
    assert changed == expected
    assert case.error(folded) < 1e-5


@pytest.mark.parametrize(("model_type", "changes"), CASES.values(), ids=list(CASES))
def test_the_search_s_own_scales_keep_the_function(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    case = layer_case(tmp_path, model_type, **changes)
    result, folded = quantize_layer(case.task(small()))
    assert all(entry.scale_spread is not None and entry.scale_spread > 1 for entry in result.report)
    assert case.error(folded) < 1e-5


def test_a_wrong_fold_is_noticed(tmp_path: Path) -> None:
    case = layer_case(tmp_path)
    _, folded = quantize_layer(case.task(small()))
    name = "input_layernorm.weight"
    assert case.error({**folded, name: case.weights[name]}) > 1e-2


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_awq_beats_rounding_where_channels_stand_out(tmp_path: Path, model_type: str) -> None:
    case = layer_case(tmp_path, model_type)
    errors = {}
    for method in ("rtn", "awq"):
        result, _ = quantize_layer(case.task(small(method=method)))
        errors[method] = case.error(result.weights(case.weights))
    assert errors["awq"] < 0.5 * errors["rtn"]


def test_losses_of_the_norm_fed_linears_fall_with_scales_and_with_clip(tmp_path: Path) -> None:
    result, _ = quantize_layer(layer_case(tmp_path).task(small(bits=3)))
    for entry in result.report:
        assert entry.loss is not None
        assert entry.loss_unclipped is not None
        assert entry.loss <= entry.loss_unclipped
        assert entry.clip_gain == pytest.approx(1 - entry.loss / entry.loss_unclipped)
    fed = [entry for entry in result.report if entry.linear in ("self_attn.q_proj", "mlp.gate_proj")]
    assert len(fed) == 2
    for entry in fed:
        assert entry.loss_rounding is not None
        assert entry.loss_unclipped is not None
        assert entry.loss_unclipped < 0.5 * entry.loss_rounding


def test_rtn_changes_nothing_but_the_linears(tmp_path: Path) -> None:
    case = layer_case(tmp_path)
    result, folded = quantize_layer(case.task(small(method="rtn")))
    assert result.dense == {}
    assert all(torch.equal(folded[name], value) for name, value in case.weights.items())
    for entry in result.report:
        assert (entry.ratio, entry.scale_spread, entry.clip_gain) == (None, None, 0.0)
        assert entry.loss == entry.loss_unclipped == entry.loss_rounding


def test_without_clip_the_grid_is_the_full_range(tmp_path: Path) -> None:
    result, folded = quantize_layer(
        layer_case(tmp_path).task(small(search=SearchSpec(grid_points=4, clip=False)))
    )
    weight = folded["self_attn.q_proj.weight"].view(64, 2, 32)
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    torch.testing.assert_close(
        result.quantized["self_attn.q_proj"].scale, (high - low) / 15, rtol=2**-10, atol=0
    )


def test_a_group_with_a_kept_linear_is_not_scaled(tmp_path: Path) -> None:
    case = layer_case(tmp_path)
    result, folded = quantize_layer(case.task(small(), kept=("self_attn.o_proj", "mlp.down_proj")))
    assert set(result.dense) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert torch.equal(folded["mlp.down_proj.weight"], case.weights["mlp.down_proj.weight"])
    assert len(result.report) == 5
    result, _ = quantize_layer(case.task(small(), kept=("mlp.gate_proj", "mlp.up_proj")))
    (entry,) = (entry for entry in result.report if entry.linear == "mlp.down_proj")
    assert (entry.ratio, entry.reason) == (None, "no scales: mlp.up_proj keeps its precision")


def test_what_computed_the_clip_search_is_reported(tmp_path: Path) -> None:
    case, cpu = layer_case(tmp_path), torch.device("cpu")
    for changes, expected in (
        ({}, {search_backend(cpu)}),
        ({"group_size": -1}, {clip_backend(cpu, 64), clip_backend(cpu, 128)}),
        ({"method": "rtn"}, {None}),
    ):
        result, _ = quantize_layer(case.task(small(**changes)))
        assert {entry.backend for entry in result.report} == expected
    assert clip_backend(cpu, 256) == clip_backend(torch.device("meta"), 32) == "torch"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_stored_fits_the_model_s_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    case = layer_case(tmp_path, "qwen2")
    rounded = {name: value.to(dtype).float() for name, value in case.weights.items()}
    result, _ = quantize_layer(case.task(small(), weights=rounded, dtype=dtype))
    assert "self_attn.v_proj.bias" in result.dense
    for values in result.dense.values():
        assert torch.equal(values.to(dtype).float(), values)
    for weight in result.quantized.values():
        assert torch.equal(weight.scale.to(dtype).float(), weight.scale)
        assert torch.equal(weight.scale.half().float(), weight.scale)


@pytest.mark.parametrize(
    ("largest", "recipe", "changes", "words"),
    [
        (1e5, {}, {"dtype": torch.float16}, ("run in float16", "bfloat16 model")),
        (1e5, {}, {"formats": ("awq",)}, ("run in float16", "compressed-tensors alone")),
        (
            1e5,
            {},
            {"formats": ("compressed-tensors", "gptq")},
            ("run in float16", "compressed-tensors alone"),
        ),
        (5e4, {}, {}, None),  # the scale is 6,667 at four bits
        (1e5, {"bits": 2}, {}, ("at 2 bits", "use more bits")),
        (2.7e6, {}, {}, ("at 4 bits", "use more bits")),
        (2.7e6, {"bits": 8}, {}, None),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_weights_beyond_what_files_hold_are_refused_with_a_remedy_that_helps(
    tmp_path: Path,
    method: str,
    largest: float,
    recipe: dict[str, object],
    changes: dict[str, object],
    words: tuple[str, str] | None,
) -> None:
    case = layer_case(tmp_path)
    case.weights["mlp.gate_proj.weight"][0, 0] = largest
    task = case.task(small(method=method, **recipe), **{"dtype": torch.bfloat16, **changes})
    if words is None:
        rounded = quantize_layer(task)[0].quantized["mlp.gate_proj"].dequantize()
        assert torch.isfinite(rounded).all()
        return
    with pytest.raises(RecipeUnsupported, match=r"^mlp\.gate_proj: weights up to") as refusal:
        quantize_layer(task)
    assert refusal.value.code == "weights_overflow"
    assert words[0] in refusal.value.message
    assert words[1] in refusal.value.remedy
    assert "let `ignore` match mlp.gate_proj, mlp.up_proj of this layer" in refusal.value.remedy
    assert "rtn" not in refusal.value.remedy


def test_weights_that_only_scales_make_too_large_need_a_method_without_scales() -> None:
    original = torch.full((2, 32), 1000.0)
    linear = FoldedLinear(
        "mlp.up_proj", original * 64, torch.eye(32), Scheme(bits=4, group_size=32, symmetric=True), original
    )
    with pytest.raises(RecipeUnsupported, match="with their scales folded in") as refusal:
        refuse_overflow(linear, original, ("mlp.up_proj",), in_float16=True)
    assert "use method rtn or gptq" in refusal.value.remedy
    refuse_overflow(linear, original, ("mlp.up_proj",), in_float16=False)


def test_two_runs_give_the_same_bits(tmp_path: Path) -> None:
    case = layer_case(tmp_path)
    first, second = (quantize_layer(case.task(small()))[0] for _ in range(2))
    for name, weight in first.quantized.items():
        assert weight.packed().equals(second.quantized[name].packed())


def test_kept_linears_stay_as_they_are_even_before_a_quantized_one(tmp_path: Path) -> None:
    kept = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    result, _ = quantize_layer(layer_case(tmp_path).task(small(), kept=kept))
    assert not any(name.startswith("self_attn") for name in result.dense)
    assert "self_attn.o_proj" in result.quantized


def test_losses_of_one_linear_share_a_unit_after_the_next_fold(tmp_path: Path) -> None:
    recipe = small(search=SearchSpec(grid_points=4, clip=False))
    result, _ = quantize_layer(layer_case(tmp_path).task(recipe, kept=("self_attn.q_proj",)))
    entries = {entry.linear: entry for entry in result.report}
    value = entries["self_attn.v_proj"]  # not scaled itself, but its rows are divided by the scales of o_proj
    assert entries["self_attn.o_proj"].scale_spread is not None
    assert entries["self_attn.o_proj"].scale_spread > 1
    assert value.ratio is None
    assert value.loss_unclipped == pytest.approx(value.loss_rounding, rel=1e-5)


@pytest.fixture(scope="module")
def wide_case(tmp_path_factory: pytest.TempPathFactory) -> LayerCase:
    return layer_case(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=128)


@pytest.mark.parametrize("method", ["rtn", "awq", "evolutionary"])
def test_every_width_and_group_in_turn_symmetric(wide_case: LayerCase, method: str) -> None:
    """GPTQ and OmniQuant have tests like this of their own."""
    strategy = "evolutionary" if method == "evolutionary" else "grid"
    body = {"method": "rtn" if method == "rtn" else "awq"}
    search = SearchSpec(grid_points=2, budget=12, strategy=strategy)
    for turn, (bits, group_size) in enumerate(product((2, 3, 4, 8), (32, 64, 128, -1))):
        symmetric = (turn + turn // 4) % 2 == 1
        scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        result, folded = quantize_layer(wide_case.task(small(**body, **scheme, search=search)))
        assert wide_case.error(folded) < 1e-5
        assert wide_case.error(result.weights(wide_case.weights)) < (2 if bits < 8 else 0.1)
        for entry in result.report:
            weight = result.quantized[entry.linear]
            assert weight.scheme == Scheme(**scheme)
            assert weight.scale.shape[1] == (1 if group_size == -1 else 128 // group_size)
            assert int(weight.q.max()) < 2**bits
            assert not symmetric or bool((weight.zero == 2 ** (bits - 1)).all())
            assert entry.loss is not None
            assert entry.loss_unclipped is not None
            assert entry.loss <= entry.loss_unclipped
