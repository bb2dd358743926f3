"""The body of a job, put together from a file and from options."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands.terminal import among

Method = Annotated[
    str | None,
    typer.Option(
        help="rtn, awq, gptq or omniquant.",
        show_default=False,
        autocompletion=among("rtn", "awq", "gptq", "omniquant"),
    ),
]
Bits = Annotated[int | None, typer.Option(help="2, 3, 4 or 8.", show_default=False)]
GroupSize = Annotated[int | None, typer.Option(help="32, 64, 128, or -1 for whole rows.", show_default=False)]
Symmetric = Annotated[
    bool | None, typer.Option("--symmetric/--asymmetric", help="The integer grid.", show_default=False)
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="awq, gptq or compressed-tensors; may be repeated.",
        show_default=False,
        autocompletion=among("awq", "gptq", "compressed-tensors"),
    ),
]
NumSamples = Annotated[int | None, typer.Option(help="Calibration windows.", show_default=False)]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens of a window.", show_default=False)]
Dataset = Annotated[
    str | None, typer.Option(help="Calibration text: builtin:…, hf:…, s3://…, file://….", show_default=False)
]
EvalSamples = Annotated[int | None, typer.Option(help="Evaluation windows.", show_default=False)]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="key=value; may be repeated.", show_default=False)
]
IdempotencyKey = Annotated[
    str | None, typer.Option(help="Submitting twice with one key makes one job.", show_default=False)
]
SpecFile = Annotated[
    Path | None,
    typer.Option(
        "--spec",
        help="JSON file with a whole job body, - for standard input; options change it.",
        show_default=False,
    ),
]


def read_spec(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        body = json.loads(text)
    except (OSError, ValueError) as fault:
        raise typer.BadParameter(f"{path}: {fault}", param_hint="--spec") from fault
    if not isinstance(body, dict):
        raise typer.BadParameter(f"{path} holds no JSON object", param_hint="--spec")
    return body


def job_body(
    model: str | None,
    spec: Path | None,
    *,
    formats: list[str] | None,
    sections: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The file's body, changed by the options that were given. They can't change a list of recipes."""
    body = read_spec(spec)
    if model is not None:
        body["model"] = model_reference(model)
    if "model" not in body:
        raise typer.BadParameter("name a model, or give a file with one", param_hint="MODEL")
    if formats:
        body["formats"] = formats
    for section, options in sections.items():
        if not given(options):
            continue
        if not isinstance(body.get(section, {}), dict):
            raise typer.BadParameter(
                f"options can't change the {section} of the file: it is no object", param_hint="--spec"
            )
        body[section] = {**body.get(section, {}), **given(options)}
    return body


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def model_reference(model: str) -> str:
    """An existing folder becomes a `file://` reference; anything else is the service's to understand."""
    folder = Path(model)
    return folder.resolve().as_uri() if folder.is_dir() else model


def split_labels(labels: list[str] | None) -> dict[str, str]:
    pairs = [label.partition("=") for label in labels or ()]
    for key, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"{key!r} lacks a value; write it as key=value", param_hint="--label")
    return {key: value for key, _, value in pairs}
