"""The body of a job, put together from a file and from options."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands.terminal import among
from app.core.errors import InvalidRequest

Method = Annotated[
    str | None,
    typer.Option(
        help="rtn, awq (unless told), gptq or omniquant.",
        show_default=False,
        autocompletion=among("rtn", "awq", "gptq", "omniquant"),
    ),
]
Bits = Annotated[int | None, typer.Option(help="2, 3, 4 (unless told) or 8.", show_default=False)]
GroupSize = Annotated[
    int | None,
    typer.Option(help="32, 64, 128 (unless told), or -1 for whole rows.", show_default=False),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric", help="The integer grid; asymmetric unless told.", show_default=False
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="awq, gptq or compressed-tensors (unless told); may be repeated.",
        show_default=False,
        autocompletion=among("awq", "gptq", "compressed-tensors"),
    ),
]
Rounding = Annotated[
    str | None,
    typer.Option(
        help="nearest, or gptq (slower and better).",
        show_default=False,
        autocompletion=among("nearest", "gptq"),
    ),
]
MaxRatio = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-ratio",
        help="A target: 1.01 allows one percent more perplexity; recipes are tried until one meets it.",
        show_default=False,
    ),
]
NumSamples = Annotated[int | None, typer.Option(help="Calibration windows.", show_default=False)]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens of a window.", show_default=False)]
Dataset = Annotated[
    str | None,
    typer.Option(help="Calibration text: builtin:…, hf:…, s3://…, file://… or a file.", show_default=False),
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

# Section and field of a job's body that an option sets.
PLACES = {
    "method": ("recipe", "method"),
    "bits": ("recipe", "bits"),
    "group_size": ("recipe", "group_size"),
    "symmetric": ("recipe", "symmetric"),
    "rounding": ("recipe", "rounding"),
    "max_ratio": ("target", "max_perplexity_ratio"),
    "num_samples": ("calibration", "num_samples"),
    "sequence_length": ("calibration", "sequence_length"),
    "dataset": ("calibration", "dataset"),
    "eval_samples": ("evaluation", "num_samples"),
}


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
        held = body.get(section)
        if held is not None and not isinstance(held, dict):
            raise typer.BadParameter(
                f"options can't change the {section} of the file: it is no object", param_hint="--spec"
            )
        body[section] = {**(held or {}), **given(options)}
    return body


def sections(**options: object) -> dict[str, dict[str, Any]]:
    """Options by the sections and fields that they set."""
    placed: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, field = PLACES[name]
        placed.setdefault(section, {})[field] = value
    return placed


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def model_reference(model: str) -> str:
    """A folder becomes a `file://` reference; anything else is the service's to understand.

    Raises InvalidRequest for what can only be meant as a folder, but is none: also `examples/typo`, where
    there is a folder `examples`.
    """
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):
        return Path(folder).resolve().as_uri()
    is_file = os.path.isfile(folder)
    is_path = model.startswith(("/", "./", "../", "~")) or (
        ":" not in model and os.path.dirname(model) != "" and os.path.isdir(os.path.dirname(model))
    )
    if is_file or is_path:
        raise InvalidRequest(
            f"{model} is a file" if is_file else f"there is no folder {model}",
            code="model_not_found",
            remedy="give the folder that holds config.json and the safetensors files, or a reference such as "
            "hf:org/name",
            param="model",
        )
    return model


def text_reference(dataset: str | None) -> str | None:
    """A file becomes a `file://` reference. Raises InvalidRequest for one that does not exist."""
    if dataset is None or ":" in dataset:
        return dataset
    file = os.path.expanduser(dataset)
    if not os.path.isfile(file):
        raise InvalidRequest(
            f"there is no file {dataset}",
            code="text_source_invalid",
            remedy="give a .jsonl or .txt file, or builtin:wikitext2, hf:…, s3://… or file://…",
            param="calibration.dataset",
        )
    return Path(file).resolve().as_uri()


def split_labels(labels: list[str] | None) -> dict[str, str]:
    pairs = [label.partition("=") for label in labels or ()]
    for key, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"{key!r} lacks a value; write it as key=value", param_hint="--label")
    return {key: value for key, _, value in pairs}
