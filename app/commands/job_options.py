"""Builds a job's body from a file and options."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from app.commands import option_groups
from app.commands.option_groups import without_none
from app.core.errors import InvalidRequest
from app.core.formats.registry import FormatName
from app.core.formats.schemes import CacheName, SchemeName
from app.core.records.device_names import DeviceName
from app.core.records.json_types import unrepeated
from app.core.records.specs import BUNDLED_TASKS, OWN_ANSWERS, Method
from app.core.sources.adapter_config import WRITTEN
from app.core.sources.json_file import json_fault

# Headings of the options in the help.
RECIPE, TARGET, TEXTS, SERVICE = "Recipe", "Targets", "Calibration and evaluation", "The job"


option = partial(option_groups.option, panel=RECIPE)

IdempotencyKey = Annotated[
    str | None, option("Submitting twice with the same key creates one job.", panel=SERVICE)
]
Labels = Annotated[list[str] | None, option("key=value; repeatable.", "--label", panel=SERVICE)]
Timeout = Annotated[int | None, option("Time limit of the run in seconds; default 14400.", panel=SERVICE)]
QueueTimeout = Annotated[int | None, option("Longest wait for a worker, in seconds.", panel=SERVICE)]
PriorityName = Annotated[
    str | None, option("high, normal (default) or low.", values=("high", "normal", "low"), panel=SERVICE)
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Compute again even if a result exists.", rich_help_panel=SERVICE),
]
Webhook = Annotated[str | None, option("URL to notify when the job ends.", panel=SERVICE)]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push", metavar="REPO", help="Hub repository to push the first artifact to.", show_default=False,
        rich_help_panel=SERVICE,
    ),
]  # fmt: skip
Deploy = Annotated[str | None, option("Serve the first artifact under this name.", panel=SERVICE)]


@dataclass(frozen=True)
class JobOptions:
    """The options that `submit`, `estimate` and `quantize` share."""

    method: Annotated[
        str | None, option("rtn, awq (default), gptq or omniquant.", values=get_args(Method))
    ] = None
    scheme: Annotated[
        str | None,
        option(
            "Number formats of weights and inputs: w4a16 and similar (default), fp8, w8a8, nvfp4, mxfp4, …",
            values=get_args(SchemeName),
        ),
    ] = None
    bits: Annotated[int | None, option("2, 3, 4 (default) or 8.")] = None
    group_size: Annotated[
        int | None,
        option("32, 64, 128, or -1 for whole rows; default: the largest of 128, 64 and 32 that fits."),
    ] = None
    symmetric: Annotated[
        bool | None,
        option(
            "The integer grid; default asymmetric.",
            "--symmetric/--asymmetric",
        ),
    ] = None
    rounding: Annotated[
        str | None, option("nearest, or gptq (slower and better).", values=("nearest", "gptq"))
    ] = None
    kv_cache: Annotated[
        str | None,
        option(
            "fp8: calibrate a scale for the keys and one for the values of each layer, by which servers keep "
            "their cache so.",
            values=get_args(CacheName),
        ),
    ] = None
    max_ratio: Annotated[
        float | None,
        option(
            "Quality target: tries recipes until one meets it; 1.01 allows one percent more perplexity.",
            "--max-perplexity-ratio",
            panel=TARGET,
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        option(
            "Quality target: highest KL to the original, in nats per token.",
            "--target-kl",
            panel=TARGET,
        ),
    ] = None
    min_recovery: Annotated[
        float | None,
        option(
            "Quality target: lowest share of the original's task scores, such as 0.99; needs --task.",
            panel=TARGET,
        ),
    ] = None
    max_size: Annotated[
        str | None,
        option(
            "Target: largest size of the files, such as 5GB; alone: the smallest error within it.",
            panel=TARGET,
        ),
    ] = None
    formats: Annotated[
        list[str] | None,
        option(
            f"{', '.join(get_args(FormatName))}; repeatable; default compressed-tensors.",
            "--format",
            values=get_args(FormatName),
        ),
    ] = None
    num_samples: Annotated[int | None, option("Number of calibration windows.", panel=TEXTS)] = None
    sequence_length: Annotated[int | None, option("Tokens per calibration window.", panel=TEXTS)] = None
    dataset: Annotated[
        str | None,
        option(
            "Calibration text: builtin:…, hf:…, s3://…, file://…, a file, or self: the model's answers.",
            panel=TEXTS,
        ),
    ] = None
    all_experts: Annotated[
        bool | None,
        option(
            "Calibrate each expert on every token, or on those routed to it (default).",
            "--all-experts/--routed-experts",
            panel=TEXTS,
        ),
    ] = None
    eval_samples: Annotated[int | None, option("Number of evaluation windows.", panel=TEXTS)] = None
    eval_sequence_length: Annotated[
        int | None, option("Tokens per evaluation window; default: as for calibration.", panel=TEXTS)
    ] = None
    evaluated: Annotated[
        bool | None,
        option(
            "Whether to measure the result; method rtn works without: any safetensors, tensor by tensor.",
            "--evaluation/--no-evaluation",
            panel=TEXTS,
        ),
    ] = None
    tasks: Annotated[
        list[str] | None,
        option(
            f"A task to evaluate: {', '.join(BUNDLED_TASKS)} or one of lm-eval's; repeatable.",
            "--task",
            panel=TEXTS,
        ),
    ] = None
    task_limit: Annotated[int | None, option("Documents per task; default: all.", panel=TEXTS)] = None
    serve_on: Annotated[
        str | None,
        option(
            "The device that serves the result: notes say what the scheme means there.",
            values=get_args(DeviceName),
        ),
    ] = None
    adapter: Annotated[
        str | None,
        option("A LoRA adapter as peft saves it, merged before quantization: a folder or a reference."),
    ] = None
    spec: Annotated[
        Path | None,
        option(
            "JSON file with a job's body, - for standard input; options override it.",
            "--spec",
        ),
    ] = None


# Option -> section and field of a job's body.
PLACES = {
    "method": ("recipe", "method"),
    "scheme": ("recipe", "scheme"),
    "bits": ("recipe", "bits"),
    "group_size": ("recipe", "group_size"),
    "symmetric": ("recipe", "symmetric"),
    "rounding": ("recipe", "rounding"),
    "kv_cache": ("recipe", "kv_cache"),
    "max_ratio": ("target", "max_perplexity_ratio"),
    "max_kl": ("target", "max_kl"),
    "min_recovery": ("target", "min_recovery"),
    "max_size": ("target", "max_size"),
    "tasks": ("evaluation", "tasks"),
    "task_limit": ("evaluation", "task_limit"),
    "num_samples": ("calibration", "num_samples"),
    "sequence_length": ("calibration", "sequence_length"),
    "dataset": ("calibration", "dataset"),
    "all_experts": ("calibration", "all_experts"),
    "eval_samples": ("evaluation", "num_samples"),
    "eval_sequence_length": ("evaluation", "sequence_length"),
}


def read_spec(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        body = json.loads(text, object_pairs_hook=unrepeated)
    except OSError as fault:
        raise typer.BadParameter(f"{path}: {fault}", param_hint="--spec") from fault
    except (ValueError, RecursionError) as fault:
        raise typer.BadParameter(f"{path}: {json_fault(fault)}", param_hint="--spec") from fault
    if not isinstance(body, dict):
        raise typer.BadParameter(f"{path} is not a JSON object", param_hint="--spec")
    return body


def job_body(
    model: str | None, options: JobOptions, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The file's body with the options applied. A list of recipes can't be changed by options."""
    body = read_spec(options.spec)
    if model is not None:
        body["model"] = model_reference(model)
    if "model" not in body:
        raise typer.BadParameter("name a model, or give a file with one", param_hint="MODEL")
    whole = {"formats": options.formats or None, "serve_on": options.serve_on}
    body |= without_none({**whole, "adapter": adapter_reference(options.adapter)})
    for section, changes in {**sections(options), "labels": labels or {}}.items():
        held = body.get(section)
        if changes and held is not None and not isinstance(held, dict):
            raise typer.BadParameter(
                f"options can't change the {section} of the file: it is not an object", param_hint="--spec"
            )
        if changes:
            body[section] = {**(held or {}), **changes}
    if options.evaluated is False:
        if "evaluation" in sections(options):
            raise typer.BadParameter("it contradicts the evaluation's options", param_hint="--no-evaluation")
        body["evaluation"] = None
    return body


def sections(options: JobOptions) -> dict[str, dict[str, Any]]:
    """The options that were set, by section and field of the body."""
    placed: dict[str, dict[str, Any]] = {}
    for name, (section, field) in PLACES.items():
        value = text_reference(options.dataset) if name == "dataset" else getattr(options, name)
        if value is not None:
            placed.setdefault(section, {})[field] = value
    return placed


def model_reference(model: str) -> str:
    """Turn a folder into a `file://` reference; the service checks any other reference.

    Raises InvalidRequest for a path that is not a folder, such as `examples/typo` where `examples` exists.
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
            remedy="give the folder that holds config.json and the safetensors files, or one GGUF file, or a "
            "reference such as hf:org/name",
            param="model",
        )
    return model


def adapter_reference(adapter: str | None) -> str | None:
    """As `model_reference`, for the folder of an adapter."""
    try:
        return None if adapter is None else model_reference(adapter)
    except InvalidRequest as fault:
        fault.param, fault.remedy = "adapter", WRITTEN
        raise


def text_reference(dataset: str | None) -> str | None:
    """Turn a file into a `file://` reference. Raises InvalidRequest if it does not exist."""
    if dataset is None or dataset == OWN_ANSWERS or ":" in dataset:
        return dataset
    file = os.path.expanduser(dataset)
    if not os.path.isfile(file):
        raise InvalidRequest(
            f"there is no file {dataset}",
            code="text_source_invalid",
            remedy="give a file that ends in .jsonl, .json, .csv or .txt, or builtin:wikitext2, self, hf:…, "
            "s3://… or file://…",
            param="calibration.dataset",
        )
    return Path(file).resolve().as_uri()


def split_labels(labels: list[str] | None) -> dict[str, str]:
    pairs = [label.partition("=") for label in labels or ()]
    for key, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"{key!r} lacks a value; write it as key=value", param_hint="--label")
    return {key: value for key, _, value in pairs}
