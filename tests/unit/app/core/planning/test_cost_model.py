"""Predictions: more work never costs less, sizes are exact, and the engine's constants are the engine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.core.child.assignment import PREDICTION, Noted
from app.core.planning import cost_model
from app.core.planning.cost_model import Prediction, predict
from app.core.planning.device_profile import NOMINAL, DeviceKind, DeviceProfile
from app.core.planning.plan import Plan, plan_job
from app.core.records.job import Stage
from app.core.records.specs import BUNDLED_TASKS, CalibrationSpec, JobSpec
from app.core.sources.model_source import inspect_model, open_model
from tests.tiny_models import EngineRun, tiny_model, tiny_spec
from workers.child import layer_files, own_answers, work
from workers.quantization import (
    continuations,
    evaluation,
    input_statistics,
    paired_pass,
    replay,
    scale_search,
)


@pytest.fixture
def bundled(example_model: Path) -> Path:
    return example_model


def predicted(model: Path, profile: DeviceProfile = NOMINAL["cpu"], **changes: object) -> Prediction:
    headers = inspect_model(open_model(model.as_uri(), model_roots=(model.parent,)))
    spec = JobSpec.model_validate({"model": "m", **changes})
    return predict(plan_job(spec, headers.config, headers.tensors), spec, profile)


INPUT = {  # bytes for a value
    "fp8": 220, "fp8-static": 220, "w4a8": 220, "w8a8": 130, "nvfp4": 740, "mxfp4": 740,
}  # fmt: skip


def plan_of(model: Path, scheme: str) -> Plan:
    headers = inspect_model(open_model(model.as_uri(), model_roots=(model.parent,)))
    spec = JobSpec.model_validate({"model": "m", "recipe": {"method": "rtn", "scheme": scheme}})
    return plan_job(spec, headers.config, headers.tensors)


def test_the_engine_has_the_same_constants() -> None:
    assert cost_model.SAMPLED_ROWS == scale_search.SAMPLED_ROWS
    assert cost_model.LESSON_WINDOWS == paired_pass.LESSON_WINDOWS
    assert cost_model.HELD_BACK == paired_pass.HELD_BACK
    assert cost_model.STEP_WINDOWS == paired_pass.STEP_WINDOWS
    assert cost_model.REPLAYED_BYTES == replay.REPLAYED_BYTES
    assert cost_model.MOMENT_BLOCK == input_statistics.BLOCK
    assert cost_model.FINALISTS == scale_search.FINALISTS
    assert cost_model.PART_BYTES == layer_files.PART_BYTES
    assert cost_model.BATCH_TOKENS == work.BATCH_TOKENS
    assert cost_model.CHUNK_TOKENS == evaluation.CHUNK_TOKENS
    assert cost_model.SECTION_TOKENS == continuations.SECTION_TOKENS
    assert set(cost_model.TASK_SIZES) == set(BUNDLED_TASKS)
    assert (cost_model.ANSWER_ROWS, cost_model.ANSWER_TOKENS) == (own_answers.ROWS, own_answers.ANSWER_TOKENS)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"calibration": {"num_samples": 32}}, {"calibration": {"num_samples": 64}}),
        ({"calibration": {"sequence_length": 128}}, {"calibration": {"sequence_length": 256}}),
        ({"evaluation": {"num_samples": 8}}, {"evaluation": {"num_samples": 16}}),
        ({"recipe": {"method": "rtn"}}, {"recipe": {"method": "awq"}}),
        ({"recipe": {"search": {"clip": False}}}, {"recipe": {}}),
        ({"recipe": {"search": {"grid_points": 10}}}, {"recipe": {"search": {"grid_points": 40}}}),
        ({"recipe": {}}, {"recipe": {"rounding": "gptq"}}),
        ({"recipe": {}}, {"recipe": {"search": {"strategy": "evolutionary"}}}),
        ({"recipe": {"rounding": "gptq"}}, {"recipe": {"method": "omniquant", "rounding": "gptq"}}),
        ({"recipe": [{}]}, {"recipe": [{}, {"bits": 3}]}),
        ({}, {"calibration": {"dataset": "self"}}),
        (
            {"calibration": {"dataset": "self"}},
            {"calibration": {"dataset": "self", "num_samples": 256}},
        ),
        ({"evaluation": {}}, {"evaluation": {"tasks": ["builtin:agreement"]}}),
        (
            {"evaluation": {"tasks": ["builtin:agreement"]}},
            {"evaluation": {"tasks": ["builtin:continuation"]}},
        ),
        (
            {"evaluation": {"tasks": ["builtin:continuation"], "task_limit": 50}},
            {"evaluation": {"tasks": ["builtin:continuation"], "task_limit": 100}},
        ),
    ],
)
def test_more_work_takes_longer(bundled: Path, less: dict[str, object], more: dict[str, object]) -> None:
    small, large = predicted(bundled, **less), predicted(bundled, **more)
    assert small.total_seconds < large.total_seconds
    assert small.ram_bytes <= large.ram_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_own_answers_hold_the_whole_model(bundled: Path, device: DeviceKind) -> None:
    texts: tuple[dict[str, object], ...] = ({}, {"dataset": "self"})
    usual, own = (
        predicted(bundled, NOMINAL[device], calibration={"num_samples": 4, "sequence_length": 64, **text})
        for text in texts
    )
    assert own.seconds[Stage.CALIBRATING] > usual.seconds[Stage.CALIBRATING]
    others = set(Stage) - {Stage.CALIBRATING}
    assert all(own.seconds.get(stage) == usual.seconds.get(stage) for stage in others)
    headers = inspect_model(open_model(bundled.as_uri(), model_roots=(bundled.parent,)))
    spec = JobSpec(model="m", calibration=CalibrationSpec(num_samples=4, sequence_length=64))
    plan = plan_job(spec, headers.config, headers.tensors)
    whole = cost_model.answers_bytes(plan, spec, device)
    assert whole > plan.parameters * 4
    held = own.vram_bytes if device == "cuda" else own.ram_bytes
    assert held >= whole


def test_a_faster_device_takes_less_time_and_other_memory(bundled: Path) -> None:
    slow = NOMINAL["cpu"]
    fast = slow.model_copy(update={"assumed": (), "matmul": {256: 9e12}, "matmul_float32": {256: 9e12}})
    assert predicted(bundled, fast).total_seconds < predicted(bundled, slow).total_seconds
    assert (predicted(bundled, fast).basis, predicted(bundled, slow).basis) == ("measured", "nominal")
    assert predicted(bundled, slow).vram_bytes == 0
    assert predicted(bundled, NOMINAL["cuda"]).vram_bytes > 0


def test_tokens_go_to_few_of_many_experts(tmp_path: Path) -> None:
    """Twice the experts: the forward pass stays as it is, the search is of twice the weights."""
    few, many = (
        predicted(
            tiny_model(tmp_path / str(count), "mixtral", num_local_experts=count, num_experts_per_tok=2),
            recipe={"group_size": 32},
        )
        for count in (4, 8)
    )
    assert (
        few.seconds[Stage.EVALUATING] < many.seconds[Stage.EVALUATING] < 1.2 * few.seconds[Stage.EVALUATING]
    )
    assert many.seconds[Stage.SEARCHING] > 1.3 * few.seconds[Stage.SEARCHING]


def test_showing_every_token_to_all_experts_costs_calibration_alone(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "mixtral", num_local_experts=8, num_experts_per_tok=2)
    routed, shown = (
        predicted(model, recipe={"group_size": 32}, calibration={"all_experts": asked})
        for asked in (False, True)
    )
    assert shown.seconds[Stage.CALIBRATING] > 1.3 * routed.seconds[Stage.CALIBRATING]
    others = set(Stage) - {Stage.CALIBRATING}
    assert {key: value for key, value in shown.seconds.items() if key in others} == {
        key: value for key, value in routed.seconds.items() if key in others
    }


def test_rates_of_the_search_follow_the_width() -> None:
    rates = {step: {256: 2e-8, 1024: 5e-8} for step in NOMINAL["cpu"].search}
    profile = NOMINAL["cpu"].model_copy(update={"search": rates})
    found = [profile.search_seconds("clip", width) for width in (64, 256, 640, 1024, 1792)]
    assert found == pytest.approx([2e-8, 2e-8, 3.5e-8, 5e-8, 8e-8])
    older = profile.model_copy(update={"search": {}})
    assert older.search_seconds("clip", 256) == NOMINAL["cpu"].search_seconds("clip", 256)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "w8a8", "w4a8", "nvfp4", "mxfp4"])
def test_rounding_inputs_costs_evaluation(bundled: Path, scheme: str) -> None:
    """Beside the same weights alone; FP4 takes more operations than FP8, and that more than int8."""
    plain = predicted(bundled, recipe={"method": "rtn", "scheme": "w8a16"}).seconds[Stage.EVALUATING]
    own = predicted(bundled, recipe={"method": "rtn", "scheme": scheme}).seconds[Stage.EVALUATING]
    linears = plan_of(bundled, scheme).candidates[0].linears
    values = 64 * 512 * sum(linear.in_features for linear in linears if linear.scheme)
    assert own - plain == pytest.approx(values * INPUT[scheme] / NOMINAL["cpu"].elementwise, rel=1e-6)
    few = {"method": "rtn", "scheme": scheme, "ignore": ["lm_head", "re:.*mlp.*"]}
    assert predicted(bundled, recipe=few).seconds[Stage.EVALUATING] < own


def test_steps_on_other_numbers_have_their_own_cost(bundled: Path) -> None:
    def searching(scheme: str, method: str) -> float:
        recipe = {"method": method, "scheme": scheme}
        return predicted(bundled, recipe=recipe).seconds[Stage.SEARCHING]

    assert searching("w4a8", "awq") == searching("w4a16", "awq")
    assert searching("nvfp4a16", "awq") > searching("fp8", "awq")
    assert searching("fp8", "gptq") < searching("w4a16", "gptq")
    assert searching("w8a8", "gptq") > searching("w4a16", "gptq")  # ranges of whole rows
    assert searching("nvfp4a16", "rtn") > searching("fp8", "rtn") > searching("w4a16", "rtn")


def test_a_target_needs_room_for_statistics(bundled: Path) -> None:
    target = {"target": {"max_kl": 0.1}}
    assert predicted(bundled, **target).disk_bytes > predicted(bundled).disk_bytes


def test_the_report_holds_prediction_and_fact(tmp_path: Path) -> None:
    run = EngineRun(tiny_spec(), tiny_model(tmp_path / "model"), tmp_path / "work")
    prediction, (candidate,) = run.report.prediction, run.report.candidates
    assert prediction is not None
    assert set(run.report.stages) <= set(prediction.seconds)
    written = sum(candidate.bytes.values())
    headers = written - prediction.output_bytes[0]
    assert 0 < headers < 8192  # the files' own headers: names, shapes and offsets of the tensors
    assert prediction.basis == "nominal"
    note = next(each for each in run.messages if isinstance(each, Noted) and each.code == PREDICTION)
    assert Prediction.model_validate(note.detail) == prediction
