from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from app.commands import quantize
from app.commands.job_options import text_reference
from app.core.child.assignment import REPORT, Finished, OutputFolder
from app.core.child.job_child import exit_fault, protocol_fault
from app.core.errors import (
    DeviceFault,
    InvalidRequest,
    JobFault,
    NibbleError,
    OutOfMemory,
    TargetMissed,
    TextRefused,
    WorkerDisk,
)
from app.core.faults.system_faults import STATE_FOLDER
from app.core.records.job import Problem
from app.core.records.specs import CalibrationSpec, JobSpec
from app.core.settings import Settings
from app.core.sources.fetching import fetch_texts


def finished_in(work: Path, labels: list[str], *outputs: tuple[int, str]) -> Finished:
    """What a child leaves: a folder with one file for each (recipe index, format), and the report."""
    made = []
    for index, format_name in outputs:
        folder = work / "output" / f"{index}-{format_name}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f"{index} {format_name}")
        made.append(
            OutputFolder.model_validate(
                {
                    "recipe_index": index, "format": format_name,
                    "folder": folder.relative_to(work).as_posix(), "summary": {"label": labels[index]},
                }
            )
        )  # fmt: skip
    (work / "report.json").write_text("{}")
    return Finished(report="report.json", outputs=tuple(made))


def placed(tmp_path: Path, labels: list[str], *outputs: tuple[int, str]) -> list[str]:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    quantize.move_outputs(finished_in(work, labels, *outputs), work, out)
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_one_output_is_the_folder_itself(tmp_path: Path) -> None:
    assert placed(tmp_path, ["awq w4 g128"], (0, "awq")) == ["config.json", "nibble-report.json"]


def test_two_formats_get_a_folder_each(tmp_path: Path) -> None:
    files = placed(tmp_path, ["awq w4 g128"], (0, "awq"), (0, "compressed-tensors"))
    assert files == ["awq/config.json", "compressed-tensors/config.json", "report.json"]


def test_recipes_are_named_and_equal_names_numbered(tmp_path: Path) -> None:
    labels = ["rtn w4 g128", "awq w4 g128", "awq w4 g128"]
    files = placed(tmp_path, labels, (0, "awq"), (1, "awq"), (2, "awq"))
    assert files == [
        "1-awq-w4-g128-awq/config.json",
        "2-awq-w4-g128-awq/config.json",
        "report.json",
        "rtn-w4-g128-awq/config.json",
    ]


def test_the_report_of_a_missed_target_is_kept_beside_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / REPORT).parent.mkdir()
    (tmp_path / REPORT).write_text('{"model": "a/b", "candidates": [{"label": "awq w4 g128"}]}')
    out = tmp_path / "out"
    quantize.keep_report(tmp_path, out, JobFault("died", code="child_died"))
    assert (tmp_path / REPORT).is_file()
    quantize.keep_report(tmp_path, out, TargetMissed("missed"))
    assert json.loads((tmp_path / "out.report.json").read_text())["model"] == "a/b"
    assert not out.exists()
    assert "awq w4 g128" in capsys.readouterr().err


def test_a_used_folder_is_left_alone(tmp_path: Path, example_model: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(example_model), "-o", str(tmp_path)])
    assert ended.value.code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^recipe\.bits: ") as caught:
        quantize.read_job_spec({"model": "a/b", "recipe": {"bits": 5}})
    assert caught.value.param == "recipe.bits"


def test_the_assignment_of_a_folder(tmp_path: Path, example_model: Path) -> None:
    spec = JobSpec(model=example_model.as_uri())
    assignment = quantize.prepare(spec, tmp_path, "cpu")
    assert assignment.model_folder == example_model
    assert len(assignment.model_digest) == 64
    assert assignment.calibration_file is None
    assert (tmp_path / "checkpoints").is_dir()


def test_a_folder_without_a_model_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(NibbleError) as caught:
        quantize.prepare(JobSpec(model=tmp_path.as_uri()), tmp_path, "cpu")
    assert caught.value.remedy


def test_the_models_own_answers_are_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self.txt").write_text("text")
    assert text_reference("self") == "self"
    assert text_reference("./self.txt") == (tmp_path / "self.txt").resolve().as_uri()
    assert calibrated_on("self", tmp_path) is None


def calibrated_on(dataset: str | None, folder: Path) -> Path | None:
    settings = Settings(state_dir=folder, model_roots=(Path("/"),))
    spec = JobSpec(model="org/name", calibration=CalibrationSpec(dataset=dataset))
    return fetch_texts(spec, settings, folder, quantize.no_news, in_place=True).calibration


def test_text_files(tmp_path: Path) -> None:
    text = tmp_path / "a b.txt"
    text.write_text("hello")
    assert calibrated_on(text.as_uri(), tmp_path) == text
    assert calibrated_on(None, tmp_path) is None
    assert calibrated_on("builtin:wikitext2", tmp_path) is None
    with pytest.raises(TextRefused, match="does not exist"):
        calibrated_on((tmp_path / "gone.txt").as_uri(), tmp_path)


def test_a_model_of_links_is_read(tmp_path: Path, example_model: Path) -> None:
    """The hub's cache is made of them."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in example_model.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "work").mkdir()
    assignment = quantize.prepare(JobSpec(model=snapshot.as_uri()), tmp_path / "work", "cpu")
    assert assignment.model_folder == snapshot


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *arguments])
    assert ended.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "tpu"), "--device 'tpu' is not a device"),
        (("--device", "cuda:99"), "there is no cuda:99"),
        (("--dataset", "gone.jsonl"), "there is no file gone.jsonl"),
        (("--dataset", "builtin:pile"), "builtin:pile"),
        (("--bits", "5"), "--bits"),
        (("--bits", "3", "--format", "awq"), "holds 4 bits only"),
    ],
)
def test_what_can_not_work_is_refused_before_any_work(
    arguments: tuple[str, ...], said: str, tmp_path: Path, example_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    errors = refused(capsys, str(example_model), "-o", str(tmp_path / "out"), *arguments)
    assert said in errors
    assert "remedy" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_told_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").touch()
    for model, said in (("gone", "there is no folder"), ("model.safetensors", "is a file")):
        errors = refused(capsys, str(tmp_path / model), "-o", str(tmp_path / "out"))
        assert said in errors
        assert "config.json" in errors


FAULTS = [
    *(exit_fault(code, oom_killed=oom) for code, oom in ((-9, True), (-9, False), (-11, False), (3, False))),
    protocol_fault("a line that is no message"),
    JobFault("RuntimeError: x", code="internal", remedy="please report it with the job's events"),
    WorkerDisk("the disk is full", remedy=f"free space in {STATE_FOLDER}"),
    DeviceFault("cuda:0 failed", remedy="look at the worker's host"),
    JobFault("no such backend", code="kernel_backend_absent", remedy="set it on the worker"),
    OutOfMemory("cpu ran out of memory", remedy="a device with more memory"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.code)
def test_remedies_are_of_this_terminal(
    tmp_path: Path, fault: JobFault, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are no events, workers, retries or settings of a service here."""
    told = quantize.of_terminal(Problem.of(fault), tmp_path / "out" / ".nibble-work", "the traceback")
    assert (told.code, told.message) == (fault.code, fault.message)
    assert told.remedy
    for word in ("event", "worker", "retry", "STATE_DIR"):
        assert word not in told.remedy
    assert ("the traceback" in capsys.readouterr().err) == ("above" in told.remedy)
    if fault.code == "worker_disk":
        assert told.remedy == f"free space in {tmp_path / 'out'}"
