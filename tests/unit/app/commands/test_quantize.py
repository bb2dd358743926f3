from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from app.commands import quantize
from app.core.assignment import REPORT, Finished, OutputFolder
from app.core.errors import InvalidRequest, JobFault, NibbleError, TargetMissed
from app.core.specs import CalibrationSpec, JobSpec


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
    quantize.place(finished_in(work, labels, *outputs), work, out)
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


@pytest.mark.parametrize(
    ("dataset", "file"),
    [(None, None), ("builtin:wikitext2", None), ("file:///texts/a%20b.txt", Path("/texts/a b.txt"))],
)
def test_text_files(dataset: str | None, file: Path | None) -> None:
    assert quantize.text_file(CalibrationSpec(dataset=dataset)) == file


def test_a_text_that_needs_a_service_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="hf:org/text"):
        quantize.text_file(CalibrationSpec(dataset="hf:org/text"))
