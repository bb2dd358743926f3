"""What of an adapter is merged is decided from headers alone; what is not clear is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.core.errors import ModelRefused
from app.core.sources.adapter_config import CONFIG, LoraConfig, checked_config
from app.core.sources.adapter_model import WEIGHTS, inspect_merged
from app.core.sources.local_model import LocalModel
from app.core.sources.model_headers import ModelHeaders
from tests.adapters import DOWN, SETTINGS, factors, write_adapter
from tests.tiny_models import tiny_model

SHAPE = (64, 128)  # of the tiny model's down_proj
HEAD, TABLE = "lm_head", "model.embed_tokens"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


def files(folder: Path) -> LocalModel:
    return LocalModel(folder, (Path("/"),))


def inspected(model: Path, adapter: Path) -> ModelHeaders:
    return inspect_merged(files(model), files(adapter))


def refusal(model: Path, adapter: Path) -> ModelRefused:
    with pytest.raises(ModelRefused) as refused:
        inspected(model, adapter)
    assert refused.value.param == "adapter"
    assert refused.value.remedy
    return refused.value


def test_an_update_is_merged_into_its_linear_and_nothing_else_changes(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(SHAPE))
    before, after = inspect_merged(files(model), None), inspected(model, adapter)
    assert list(after.tensors) == list(before.tensors)
    changed = [name for name in after.tensors if after.tensors[name] != before.tensors[name]]
    assert changed == [f"{DOWN}.weight"]
    merged = after.tensors[changed[0]]
    assert merged.merged is not None
    assert (merged.merged.scale, merged.shape, merged.dtype) == (2.0, SHAPE, before.tensors[changed[0]].dtype)
    assert after.source == before.source
    assert any("rank 2, scale 2) is merged into 1 matrices before all else" in note for note in after.notes)
    assert not any("trained on" in note or "tokenizer" in note for note in after.notes)


def test_another_base_model_is_a_note(model: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "a", factors(SHAPE), base_model_name_or_path="org/other")
    assert any("it was trained on org/other" in note for note in inspected(model, other).notes)
    same = write_adapter(tmp_path / "b", factors(SHAPE), base_model_name_or_path="/home/me/Untied/")
    assert not any("trained on" in note for note in inspected(model, same).notes)


def test_a_tokenizer_beside_the_adapter_is_noted(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(SHAPE))
    (adapter / "tokenizer.json").write_text("{}")
    assert any("those beside the adapter are not used" in note for note in inspected(model, adapter).notes)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", 16 / 4),
        ("model.layers.11.mlp.down_proj", 16 / 2),
        ("model.layers.1.mlp.down_proj", 5 / 2),
        ("model.layers.1.mlp.gate_down_proj", 16 / 4),
    ],
)
def test_patterns_are_looked_up_as_peft_does(module: str, expected: float) -> None:
    config = LoraConfig(
        peft_type="LORA", r=4, lora_alpha=16,
        rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.1\.mlp\.down_proj": 5},
    )  # fmt: skip
    assert config.scale(module) == expected
    rooted = config.model_copy(update={"use_rslora": True})
    assert rooted.scale(module) == pytest.approx(expected * config.rank(module) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "code", "why"),
    [
        ({"peft_type": "LOHA"}, "adapter_unsupported", "peft_type is 'LOHA'"),
        ({"r": 0}, "adapter_invalid", "r: "),
        ({"lora_alpha": "much"}, "adapter_invalid", "lora_alpha: "),
        ({"rank_pattern": {"(a+)+b": 2}}, "adapter_invalid", "very long to match"),
        ({"rank_pattern": {"down": 0}}, "adapter_invalid", "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "adapter_unsupported", "pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "adapter_unsupported", "other weights than the model's"),
        ({"fan_in_fan_out": True}, "adapter_unsupported", "stored transposed"),
        ({"lora_bias": True}, "adapter_unsupported", "its factors have biases"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "adapter_unsupported", "repeats layers"),
        ({"trainable_token_indices": [7]}, "adapter_unsupported", "single rows of the embeddings"),
        ({"target_parameters": ["experts.down_proj"]}, "adapter_unsupported", "fused experts"),
        ({"alora_invocation_tokens": [1]}, "adapter_unsupported", "behind certain tokens"),
        ({"use_bdlora": {"nblocks": 2}}, "adapter_unsupported", "not known here"),
        ({"setting_of_tomorrow": True}, "adapter_unsupported", "setting_of_tomorrow is True"),
    ],
)
def test_settings_that_are_not_understood_are_refused(settings: dict[str, Any], code: str, why: str) -> None:
    with pytest.raises(ModelRefused) as refused:
        checked_config({**SETTINGS, **settings})
    assert (refused.value.code, refused.value.param) == (code, "adapter")
    assert why in refused.value.message


def test_settings_without_influence_are_passed_over() -> None:
    inert = {"lora_dropout": 0.1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "bias": "all",
             "loftq_config": {"loftq_bits": 4}, "setting_of_tomorrow": None, "peft_version": "9"}  # fmt: skip
    assert checked_config({**SETTINGS, **inert}).r == 2


TWO = torch.zeros(2, 2)
CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any], str, str]] = {
    "a module that the model lacks": (
        factors(SHAPE, "model.layers.9.mlp.down_proj"), {}, "adapter_mismatch",
        "changes model.layers.9.mlp.down_proj.weight, which the model's files do not hold",
    ),
    "another shape": (factors((64, 96)), {}, "adapter_mismatch", "do not fit the model's weight [64, 128]"),
    "another rank": (factors(SHAPE, rank=3), {}, "adapter_mismatch", "at rank 2"),
    "half a pair": (
        dict([factors(SHAPE).popitem()]), {}, "adapter_unsupported", "A and B are not both there",
    ),
    "an unknown part": (
        {**factors(SHAPE), f"{DOWN}.lora_C.weight": TWO}, {}, "adapter_unsupported", "lora_C.weight",
    ),
    "tokens": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": TWO}, {}, "adapter_unsupported",
        "trainable_tokens_delta",
    ),
    "integers": (
        {f"{DOWN}.lora_A.weight": TWO.int(), f"{DOWN}.lora_B.weight": TWO.int()}, {}, "adapter_unsupported",
        "of I32",
    ),
    "a norm": (
        factors((64, 128), "model.norm"), {}, "adapter_unsupported", "no matrix of floating-point numbers",
    ),
    "magnitudes without DoRA": (
        {**factors(SHAPE), f"{DOWN}.lora_magnitude_vector": torch.ones(64)}, {}, "adapter_unsupported",
        "use_dora false with 1 magnitudes",
    ),
    "DoRA without magnitudes": (
        factors(SHAPE), {"use_dora": True}, "adapter_unsupported", "with 0 magnitudes",
    ),
    "too many magnitudes": (
        {**factors(SHAPE), f"{DOWN}.lora_magnitude_vector": torch.ones(65)}, {"use_dora": True},
        "adapter_unsupported", "the magnitudes of",
    ),
    "a larger vocabulary": (
        {f"{HEAD}.weight": torch.zeros(4100, 64)}, {}, "adapter_mismatch", "had another vocabulary",
    ),
    "a module to save that the model lacks": (
        {"score.weight": TWO}, {}, "adapter_mismatch", "changes score.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tensors_that_do_not_fit_are_refused(case: str, model: Path, tmp_path: Path) -> None:
    tensors, settings, code, why = CASES[case]
    refused = refusal(model, write_adapter(tmp_path / "adapter", tensors, **settings))
    assert refused.code == code
    assert why in refused.message


def test_names_without_pefts_prefix_are_refused(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(SHAPE), prefix="transformer.")
    assert "transformer.model.layers" in refusal(model, adapter).message


@pytest.mark.parametrize("name", [TABLE, HEAD])
@pytest.mark.parametrize("whole", [True, False])
def test_embeddings_that_are_the_head_too_are_refused(
    name: str, whole: bool, model: Path, tied: Path, tmp_path: Path
) -> None:
    if whole:
        tensors = {f"{name}.weight": torch.zeros(4096, 64)}
    elif name == HEAD:
        tensors = factors((4096, 64), HEAD)
    else:
        tensors = {
            f"{TABLE}.lora_embedding_A": torch.zeros(2, 4096),
            f"{TABLE}.lora_embedding_B": torch.zeros(64, 2),
        }
    adapter = write_adapter(tmp_path / "adapter", tensors)
    assert inspected(model, adapter).tensors[f"{name}.weight"].merged is not None
    refused = refusal(tied, adapter)
    assert refused.code == ("adapter_unsupported" if name == TABLE else "adapter_mismatch")
    assert ("one matrix for embeddings and head" if name == TABLE else "of the embeddings") in refused.message


@pytest.mark.parametrize(
    ("path", "content"),
    [
        *(
            (CONFIG, content)
            for content in (b"[]", b"{", b"\xff", b'{"peft_type": "LORA"}', b" " * (4 * 1024**2 + 1))
        ),
        *((WEIGHTS, content) for content in (b"", b"\xff" * 8, b"\x08" + b"\0" * 7 + b"not json", None)),
    ],
)
def test_a_damaged_file_is_a_fault_of_the_adapter(
    model: Path, tmp_path: Path, path: str, content: bytes | None
) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(SHAPE))
    cut = (adapter / path).read_bytes()[:-8]
    (adapter / path).write_bytes(cut if content is None else content)
    refused = refusal(model, adapter)
    assert (refused.code, refused.param) == ("adapter_invalid", "adapter")
    assert path in refused.message
    assert refused.remedy in ("save the adapter again with peft's save_pretrained", "repair it")


def test_missing_files_are_refused(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(SHAPE))
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "only adapter_model.bin, which can run code" in refusal(model, adapter).message
    (adapter / "adapter_model.bin").rename(adapter / WEIGHTS)
    (adapter / CONFIG).unlink()
    assert f"holds no {CONFIG}" in refusal(model, adapter).message


def test_an_adapter_in_place_of_the_model_is_told_so(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(SHAPE))
    with pytest.raises(ModelRefused) as refused:
        inspect_merged(files(adapter), None)
    assert "this as `adapter`" in refused.value.remedy
    (adapter / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelRefused) as refused:
        inspect_merged(files(adapter), None)
    assert "as `adapter`" in refused.value.remedy
