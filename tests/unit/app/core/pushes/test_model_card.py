from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from app.core.pushes.model_card import SourceCard, model_card
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.specs import Recipe

RECIPE = Recipe(group_size=128)
MANIFEST = ArtifactManifest(
    id="art_1",
    tenant="t",
    job="job_1",
    created_at=datetime(2026, 11, 28, tzinfo=UTC),
    model="hf:org/source@" + "a" * 40,
    model_digest="0" * 64,
    recipe=RECIPE,
    format="compressed-tensors",
    prefix="attempt-1",
    files=(ArtifactFile(path="model.safetensors", size=2_500_000_000, sha256="0" * 64),),
)
CANDIDATE = {
    "recipe_index": 0, "recipe": RECIPE.model_dump(mode="json"), "perplexity": 10.25,
    "perplexity_ratio": 1.025,
    "perplexity_ratio_interval": {"low": 1.01, "high": 1.04}, "kl": 0.03, "bits_per_weight": 4.25,
    "top1_agreement": 0.91, "beyond_noise": True,
    "tasks": {"scores": [{"task": "arc_easy", "metric": "acc", "documents": 100, "original": 0.5,
                          "original_standard_error": 0.05, "quantized": 0.49,
                          "quantized_standard_error": 0.051}]},
}  # fmt: skip
REPORT: dict[str, Any] = {
    "original": {"perplexity": 10.0}, "candidates": [CANDIDATE],
    "calibration": {"dataset": "builtin:wikitext2", "windows": 128, "sequence_length": 512, "seed": 7},
    "evaluation": {"dataset": "builtin:wikitext2", "windows": 64, "sequence_length": 512},
    "source": {"format": "safetensors", "types": {"BF16": 10}},
}  # fmt: skip


def front_matter(card: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return document


def test_a_card_says_what_was_done_and_how_good_it_is() -> None:
    card = model_card(MANIFEST, REPORT, SourceCard(license="apache-2.0"), "me/out")
    assert front_matter(card) == {
        "base_model": "org/source", "base_model_relation": "quantized", "license": "apache-2.0",
        "library_name": "transformers", "pipeline_tag": "text-generation", "quantized_by": "nibble",
        "tags": ["awq", "compressed-tensors", "nibble", "w4a16"],
    }  # fmt: skip
    for said in (
        "awq w4 g128", "4 bits, group size 128, asymmetric",
        "128 windows of 512 tokens of `builtin:wikitext2`",
        "seed 7", "| perplexity | 10.2500 |", "| 1.02500 | 1.01000 to 1.04000 |", "0.4900 ± 0.0510",
        "| size of all files | 2.500 GB |", "vllm serve me/out", "sglang.launch_server --model-path me/out",
        'from_pretrained("me/out")',
        "pip install transformers 'compressed-tensors", "nibble deploy art_1", "32768 tokens in all",
    ):  # fmt: skip
        assert said in card, said
    assert model_card(MANIFEST, REPORT, SourceCard(license="apache-2.0"), "me/out") == card


def test_a_card_says_what_is_not_known() -> None:
    card = model_card(MANIFEST, None, SourceCard(), "me/out")
    assert "license" not in front_matter(card)
    assert "no licence that could be read" in card
    assert "not evaluated: nothing is known of its quality" in card
    with_summary = MANIFEST.model_copy(update={"summary": {"perplexity": 10.25}})
    assert "The report is gone" in model_card(with_summary, None, SourceCard(), "me/out")
    without_tasks = {key: value for key, value in CANDIDATE.items() if key != "tasks"}
    noisy = {**REPORT, "candidates": [{**without_tasks, "beyond_noise": False}]}
    card = model_card(MANIFEST, noisy, SourceCard(), "me/out")
    assert "too short to tell" in card
    assert "No task was scored" in card


@pytest.mark.parametrize("model", ["file:///secret/place/model", "s3://bucket/secret"])
def test_a_card_names_no_folder_or_bucket_of_the_service(model: str) -> None:
    texts = {"dataset": "file:///secret/texts.jsonl", "windows": 2, "sequence_length": 8}
    report = {**REPORT, "calibration": texts, "evaluation": texts}
    card = model_card(MANIFEST.model_copy(update={"model": model}), report, SourceCard(), "me/out")
    assert "secret" not in card
    assert "bucket" not in card
    assert "base_model" not in front_matter(card)


def test_a_gguf_file_is_served_by_llama_cpp() -> None:
    card = model_card(MANIFEST.model_copy(update={"format": "gguf"}), REPORT, SourceCard(), "me/out")
    assert "llama-server -hf me/out" in card
    assert "vllm serve" not in card
    assert front_matter(card)["library_name"] == "gguf"


def test_a_source_that_was_quantized_before_is_told() -> None:
    source = {"format": "safetensors", "types": {"F8_E4M3": 10, "BF16": 2}}
    assert "itself was quantized" in model_card(
        MANIFEST, {**REPORT, "source": source}, SourceCard(), "me/out"
    )
    assert "itself was quantized" not in model_card(MANIFEST, REPORT, SourceCard(), "me/out")


@pytest.mark.parametrize(
    ("adapter", "base", "relation", "words"),
    [
        (
            "hf:me/tuned@" + "b" * 40,
            ["org/source", "me/tuned"],
            "merge",
            "with the adapter `me/tuned` merged",
        ),
        ("s3://secret/folder", "org/source", "finetune", "with an adapter of its owner's merged into it"),
    ],
)
def test_a_card_names_the_adapter(adapter: str, base: object, relation: str, words: str) -> None:
    card = model_card(MANIFEST.model_copy(update={"adapter": adapter}), REPORT, SourceCard(), "me/out")
    assert front_matter(card)["base_model"] == base
    assert front_matter(card)["base_model_relation"] == relation
    assert words in card
    assert "secret" not in card
