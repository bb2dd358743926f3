from __future__ import annotations

from pathlib import Path

import pytest

from app.core.errors import InvalidRequest, ModelRefused, RecipeUnsupported, TextRefused
from app.core.jobs.estimate import estimate
from app.core.jobs.submission import check_submission, refuse_own_storage
from app.core.records.specs import CalibrationSpec, EvaluationSpec, JobSpec, Recipe
from app.core.settings import Settings
from tests.tiny_models import EngineRun, tiny_model, tiny_spec


@pytest.fixture
def settings(example_model: Path, tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path, model_roots=(example_model.parent, tmp_path))


def test_the_bundled_model_is_accepted_as_written(settings: Settings, example_model: Path) -> None:
    checked = check_submission(JobSpec(model=example_model.as_uri()), settings)
    assert checked.spec.model == example_model.as_uri()
    assert checked.plan.num_layers == 6
    assert checked.download_bytes == 0  # it is read in place


def test_an_estimate_names_every_linear(settings: Settings, example_model: Path) -> None:
    spec = JobSpec(model=example_model.as_uri(), formats=("awq", "compressed-tensors"))
    found = estimate(check_submission(spec, settings), "cpu")
    assert found.layers == 6
    assert len(found.candidates[0].linears) == 6 * 7
    assert found.output_bytes == sum(found.candidates[0].output_bytes.values())
    assert found.vram_bytes == 0


def test_a_model_that_the_usual_groups_do_not_divide_needs_no_recipe(tmp_path: Path) -> None:
    """Submitted, estimated and run with nothing but its name: the number is in the record, and the reason
    in the estimate, the events and the report."""
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    model = tiny_model(tmp_path / "model", num_hidden_layers=1, head_dim=64, **shape)
    settings = Settings(state_dir=tmp_path, model_roots=(tmp_path,))
    body = {"model": model.as_uri(), "recipe": [{}, {"method": "rtn", "group_size": 32}]}
    checked = check_submission(JobSpec.model_validate(body), settings)
    assert [recipe.group_size for recipe in checked.spec.recipes] == [64, 32]
    (choice,) = checked.plan.choices
    assert "recipe 0: group_size 64" in choice
    assert "in_features=576" in choice
    assert choice in estimate(checked, "cpu").notes
    asked = {"model": model.as_uri(), "recipe": [{"group_size": 64}, {"method": "rtn", "group_size": 32}]}
    same = check_submission(JobSpec.model_validate(asked), settings)
    assert (same.spec, same.fingerprint) == (checked.spec, checked.fingerprint)
    assert check_submission(JobSpec(model=model.as_uri()), settings).spec.recipe == Recipe(group_size=64)
    spec = tiny_spec(checked.spec.recipes[1:])
    run = EngineRun(spec, model, tmp_path / "work", choices=checked.plan.choices)
    assert choice in run.report.notes
    assert choice in [message.message for message in run.messages if message.kind == "note"]


def test_a_gpu_is_faster_and_takes_its_own_memory(settings: Settings, example_model: Path) -> None:
    checked = check_submission(JobSpec(model=example_model.as_uri()), settings)
    assert estimate(checked, "cuda").time_s < estimate(checked, "cpu").time_s
    assert estimate(checked, "cuda").vram_bytes > 0


def test_a_folder_outside_the_roots_is_refused(tmp_path: Path, example_model: Path) -> None:
    with pytest.raises(ModelRefused):
        check_submission(JobSpec(model=example_model.as_uri()), Settings(state_dir=tmp_path))


def test_a_recipe_that_the_format_cannot_hold_is_refused(settings: Settings, example_model: Path) -> None:
    spec = JobSpec(model=example_model.as_uri(), recipe=Recipe(bits=3), formats=("awq",))
    with pytest.raises(RecipeUnsupported) as refusal:
        check_submission(spec, settings)
    assert refusal.value.remedy


def refused_texts(calibration: CalibrationSpec, settings: Settings, model: Path) -> InvalidRequest:
    with pytest.raises(TextRefused) as refusal:
        check_submission(JobSpec(model=model.as_uri(), calibration=calibration), settings)
    return refusal.value


def test_an_unknown_bundled_dataset_is_refused(settings: Settings, example_model: Path) -> None:
    refusal = refused_texts(CalibrationSpec(dataset="builtin:nothing"), settings, example_model)
    assert (refusal.code, refusal.param) == ("dataset_unknown", "calibration.dataset")


@pytest.mark.parametrize("texts", [("  \n ",), ("too short",), ("x" * 65_000,)])
def test_texts_that_fill_no_window_are_refused(
    settings: Settings, example_model: Path, texts: tuple[str, ...]
) -> None:
    refusal = refused_texts(CalibrationSpec(texts=texts), settings, example_model)
    assert (refusal.code, refusal.param) == ("text_too_short", "calibration.texts")


def test_what_a_chat_template_adds_is_not_known_at_submission(
    settings: Settings, example_model: Path
) -> None:
    calibration = CalibrationSpec(texts=("hello",) * 100, chat_template="always")
    spec = JobSpec(model=example_model.as_uri(), calibration=calibration)
    assert check_submission(spec, settings).spec.calibration == calibration


def test_an_empty_text_file_is_refused(settings: Settings, example_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    empty = CalibrationSpec(dataset=(tmp_path / "empty.jsonl").as_uri())
    assert "the file is empty" in refused_texts(empty, settings, example_model).message


def test_a_missing_text_file_is_refused(settings: Settings, example_model: Path, tmp_path: Path) -> None:
    missing = CalibrationSpec(dataset=(tmp_path / "none.jsonl").as_uri())
    assert refused_texts(missing, settings, example_model).param == "calibration.dataset"


def test_a_text_file_under_a_root_is_accepted(
    settings: Settings, example_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "hello"}\n')
    reference = (tmp_path / "texts.jsonl").as_uri()
    spec = JobSpec(model=example_model.as_uri(), evaluation=EvaluationSpec(dataset=reference))
    assert check_submission(spec, settings).spec.evaluation.dataset == reference


def test_what_lies_in_the_services_own_storage_is_no_source(settings: Settings, example_model: Path) -> None:
    """Another tenant's files, by the storage's address instead of their id."""
    inside = settings.state_dir / "storage" / "artifacts" / "art_x" / "attempt-1"
    inside.mkdir(parents=True)
    (inside / "merges.txt").write_text("words " * 100_000)
    link = settings.state_dir / "models"
    link.symlink_to(inside)
    bucket = settings.model_copy(update={"storage_url": "s3://bucket/nibble/"})
    for place, where in (
        (inside.as_uri(), settings),
        (link.as_uri(), settings),
        ("s3://bucket/nibble/artifacts/art_x/attempt-1", bucket),
        ("s3://bucket/nibble/checkpoints", bucket),
    ):
        with pytest.raises(ModelRefused, match="own storage") as refusal:
            check_submission(JobSpec(model=place), where)
        assert (refusal.value.code, refusal.value.param) == ("model_path_forbidden", "model")
        text = CalibrationSpec(dataset=f"{place}/merges.txt")
        with pytest.raises(ModelRefused, match="own storage") as refusal:
            check_submission(JobSpec(model=example_model.as_uri(), calibration=text), where)
        assert refusal.value.param == "calibration.dataset"
    for other in ("s3://bucket/nibble/models/x", "s3://other/nibble/artifacts/x", "s3://bucket/artifacts/x"):
        refuse_own_storage(other, bucket, param="model")


def test_a_length_of_evaluation_that_is_calibrations_is_the_same_work(
    settings: Settings, example_model: Path
) -> None:
    fingerprints = [
        check_submission(
            JobSpec(model=example_model.as_uri(), evaluation=EvaluationSpec(sequence_length=length)), settings
        ).fingerprint
        for length in (None, 512, 256)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_inline_text_that_repeats_itself_is_noted_before_the_run(
    settings: Settings, example_model: Path
) -> None:
    texts = ("The quick brown fox jumps over the lazy dog. " * 200,)
    spec = JobSpec(
        model=example_model.as_uri(),
        calibration=CalibrationSpec(texts=texts, num_samples=4, sequence_length=64),
        evaluation=EvaluationSpec(texts=texts, num_samples=8),
    )
    starts = ("the calibration text repeats", "the evaluation text repeats", "the recipes are calibrated on")
    notes = estimate(check_submission(spec, settings), "cpu").notes
    for start in starts:
        assert sum(note.startswith(start) for note in notes) == 1


def test_too_little_text_names_the_length_of_its_own_windows(settings: Settings, example_model: Path) -> None:
    spec = JobSpec(
        model=example_model.as_uri(),
        evaluation=EvaluationSpec(texts=("A river. " * 20,), num_samples=2, sequence_length=128),
    )
    with pytest.raises(TextRefused) as refusal:
        check_submission(spec, settings)
    assert (refusal.value.code, refusal.value.param) == ("text_too_short", "evaluation.texts")
    assert "2 windows of 128 tokens" in refusal.value.message
    assert "evaluation.sequence_length" in str(refusal.value.remedy)


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "transformers", "max_model_len": 1025},
        {"max_model_len": 1025},
        {"engine": "vllm", "vllm": {"max_model_len": 1025}},
    ],
)
def test_a_deployment_beyond_the_models_length_is_refused_before_the_run(
    settings: Settings, example_model: Path, options: dict[str, object]
) -> None:
    spec = JobSpec.model_validate({"model": example_model.as_uri(), "deploy": {"name": "x", **options}})
    with pytest.raises(InvalidRequest, match="the model reads 1024 tokens at most") as refusal:
        check_submission(spec, settings)
    assert refusal.value.code == "max_model_len_too_large"
    assert refusal.value.param in ("deploy.max_model_len", "deploy.vllm.max_model_len")
