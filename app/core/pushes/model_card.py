"""The model card of a pushed artifact: what was done, how good it is, how to serve it, and what is not known.

It follows from the manifest, the report and the source's own card alone, so that a push that is taken up
again writes the same bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from app.core.errors import ModelRefused
from app.core.formats.registry import FORMATS
from app.core.records.artifact import ArtifactManifest
from app.core.records.counted import counted
from app.core.records.specs import Recipe
from app.core.sources.model_reference import parse_model_reference

METHODS = {
    "rtn": "Weights were rounded to the nearest number of the scheme, without calibration of scales",
    "awq": "AWQ: scales of input channels were searched on the calibration text and folded away",
    "gptq": "GPTQ: each column's rounding error was spread over the columns to come",
    "omniquant": "OmniQuant: ranges and scales were learned from each layer's output",
}


PLAIN_TYPES = {"F64", "F32", "F16", "BF16"}


class SourceCard(BaseModel):
    """What the source's own card says of its licence, as the hub gives it."""

    model_config = ConfigDict(extra="ignore")

    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None


def source_repository(model: str) -> str | None:
    """The hub repository of a model's reference; None for other sources."""
    try:
        parsed = parse_model_reference(model)
    except ModelRefused:
        return None
    return parsed.path if parsed.scheme == "hf" else None


def model_card(
    manifest: ArtifactManifest, report: Mapping[str, Any] | None, source: SourceCard, repo_id: str
) -> str:
    """README.md of the repository. `report`: the job's, None if it is gone."""
    candidate = candidate_of(manifest, report)
    sections = [
        f"# {repo_id.partition('/')[2]}",
        " ".join(origin(manifest, source)),
        "## What was done\n\n" + "\n".join(f"- {line}" for line in done(manifest, report)),
        "## Figures\n\n" + "\n".join(figures(manifest, report, candidate)),
        "## Use it\n\n" + "\n\n".join(uses(manifest, repo_id)),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in limits(manifest, report, candidate)),
    ]
    return front_matter(manifest, source) + "\n" + "\n\n".join(sections) + "\n"


def front_matter(manifest: ArtifactManifest, source: SourceCard) -> str:
    """YAML; a JSON value is a value of YAML."""
    base = source_repository(manifest.model)
    adapter = None if base is None else adapter_repository(manifest)
    entries: dict[str, Any] = {
        "base_model": base if adapter is None else [base, adapter],
        "base_model_relation": None if base is None else relation(manifest, adapter),
        **source.model_dump(exclude_none=True),
        "library_name": "gguf" if FORMATS[manifest.format].single_file else "transformers",
        "pipeline_tag": "text-generation",
        "quantized_by": "nibble",
        "tags": sorted({"nibble", manifest.format, manifest.recipe.method, scheme_of(manifest.recipe)}),
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in entries.items() if value is not None]
    return "\n".join(["---", *lines, "---", ""])


def adapter_repository(manifest: ArtifactManifest) -> str | None:
    return None if manifest.adapter is None else source_repository(manifest.adapter)


def relation(manifest: ArtifactManifest, adapter: str | None) -> str:
    """What the artifact is of its base model, in the hub's words."""
    if manifest.adapter is None:
        return "quantized"
    return "finetune" if adapter is None else "merge"


def scheme_of(recipe: Recipe) -> str:
    return f"w{recipe.bits}a16" if recipe.scheme == "wna16" else recipe.scheme


def origin(manifest: ArtifactManifest, source: SourceCard) -> Iterator[str]:
    base = source_repository(manifest.model)
    # Folders and buckets of the service are its own business.
    name = "a model of its owner's" if base is None else f"`{base}`"
    revision = manifest.model.partition("@")[2]
    at = f" at revision `{revision[:12]}`" if base is not None and revision else ""
    adapter, merged = adapter_repository(manifest), ""
    if manifest.adapter is not None:
        what = "an adapter of its owner's" if adapter is None else f"the adapter `{adapter}`"
        merged = f" with {what} merged into it"
    yield f"This is {name}{at}{merged}, quantized by Nibble."
    if base is not None and source.license is None:
        yield "The source's card names no licence that could be read: see there before you use it."


def done(manifest: ArtifactManifest, report: Mapping[str, Any] | None) -> Iterator[str]:
    recipe = manifest.recipe
    rounding = ", with GPTQ's rounding" if recipe.rounding == "gptq" and recipe.method != "gptq" else ""
    yield f"Recipe `{recipe.label}`. {METHODS[recipe.method]}{rounding}."
    group = {"auto": "the model's largest", -1: "a whole row"}.get(recipe.group_size, recipe.group_size)
    grid = "symmetric" if recipe.symmetric else "asymmetric"
    yield f"Scheme {scheme_of(recipe)}: {recipe.bits} bits, group size {group}, {grid}."
    if manifest.adapter is not None:
        yield (
            "A LoRA adapter was merged into the weights in float32 first: the original of all figures is "
            "that model."
        )
    if recipe.overrides:
        yield f"{len(recipe.overrides)} patterns of linears have another width: see the recipe below."
    if recipe.ignore:
        yield f"Not quantized: {', '.join(f'`{pattern}`' for pattern in recipe.ignore)}."
    calibration = (report or {}).get("calibration")
    if calibration:
        yield f"Calibration: {text_of(calibration)}, seed {calibration.get('seed', 0)}."
    yield f"Format {manifest.format}, job {manifest.job}, artifact {manifest.id}."
    yield f"The whole recipe: `{recipe.model_dump_json(exclude_defaults=True)}`"


def text_of(entry: Mapping[str, Any]) -> str:
    """A text of the report: how much of what. Files and uploads of the service are not named."""
    source = str(entry.get("dataset", ""))
    name = f"`{source}`" if source.startswith(("builtin:", "hf:", "self")) else "a text of the owner's"
    return f"{counted(entry.get('windows', 0), 'window')} of {entry.get('sequence_length')} tokens of {name}"


def candidate_of(manifest: ArtifactManifest, report: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The report's figures of this artifact, else those of its summary."""
    candidates = (report or {}).get("candidates", [])
    recipe = manifest.recipe.model_dump(mode="json")
    return next((each for each in candidates if each.get("recipe") == recipe), manifest.summary)


def figures(
    manifest: ArtifactManifest, report: Mapping[str, Any] | None, candidate: Mapping[str, Any]
) -> Iterator[str]:
    """A table: each figure with its 95 % interval, where there is one."""
    original = (report or {}).get("original", {}).get("perplexity")
    rows = [
        ("perplexity of the original", number(original, 4), ""),
        ("perplexity", number(candidate.get("perplexity"), 4), ""),
        ("ratio to the original", number(candidate.get("perplexity_ratio"), 5),
         interval(candidate.get("perplexity_ratio_interval"), 5)),
        ("KL from the original, nats per token", number(candidate.get("kl"), 5),
         interval(candidate.get("kl_interval"), 5)),
        ("same likeliest token, share", number(candidate.get("top1_agreement"), 4),
         interval(candidate.get("top1_agreement_interval"), 4)),
        *task_rows(candidate),
        ("bits per weight", number(candidate.get("bits_per_weight"), 3), ""),
        ("size of all files", f"{manifest.size / 1e9:.3f} GB", ""),
    ]  # fmt: skip
    yield "| figure | value | 95 % interval |"
    yield "|---|---|---|"
    yield from (f"| {name} | {value} | {bounds} |" for name, value, bounds in rows if value)


def task_rows(candidate: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for score in (candidate.get("tasks") or {}).get("scores", []):
        name = f"{score['task']}, {score['metric']}, {counted(score['documents'], 'document')}"
        for model in ("original", "quantized"):
            error = score.get(f"{model}_standard_error")
            uncertain = "" if error is None else f" ± {error:.4f}"
            if score.get(model) is not None:
                yield f"{name}: {model}", f"{score[model]:.4f}{uncertain}", ""


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def interval(bounds: Mapping[str, float] | None, digits: int) -> str:
    return "" if bounds is None else f"{bounds['low']:.{digits}f} to {bounds['high']:.{digits}f}"


def uses(manifest: ArtifactManifest, repo_id: str) -> Iterator[str]:
    if FORMATS[manifest.format].single_file:
        yield f"llama.cpp:\n\n```sh\nllama-server -hf {repo_id}\n```"
        return
    yield f"vLLM:\n\n```sh\nvllm serve {repo_id}\n```"
    yield f"SGLang:\n\n```sh\npython -m sglang.launch_server --model-path {repo_id}\n```"
    needs = shlex.join(("transformers", *FORMATS[manifest.format].transformers_needs))
    yield (
        f"transformers (`pip install {needs}`):\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", device_map="auto")\n```'
    )
    yield (
        "Nibble, in the service that holds the artifact:\n\n"
        f"```sh\nnibble deploy {manifest.id} --name my-model\n```"
    )


def limits(
    manifest: ArtifactManifest, report: Mapping[str, Any] | None, candidate: Mapping[str, Any]
) -> Iterator[str]:
    evaluation = (report or {}).get("evaluation")
    if candidate.get("perplexity") is None:
        yield "It was not evaluated: nothing is known of its quality."
    elif not evaluation:
        yield "The report is gone: on how much text the figures rest is not known any more."
    else:
        windows, length = evaluation.get("windows", 0), evaluation.get("sequence_length", 0)
        yield f"Evaluated on {text_of(evaluation)}, {windows * length} tokens in all, and on nothing else."
        if candidate.get("beyond_noise") is False:
            yield "That text is too short to tell its perplexity from the original's."
        if not candidate.get("tasks"):
            yield "No task was scored: perplexity and KL say little of long answers, tools or reasoning."
    yield "The files were read back and compared with what was computed; no server was run for this card."
    types = set(((report or {}).get("source") or {}).get("types", {}))
    if types - PLAIN_TYPES:
        yield f"The source itself was quantized ({', '.join(sorted(types))}): what was lost before is lost."
