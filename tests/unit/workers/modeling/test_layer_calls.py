"""Families that call their layers in their own ways, streamed as transformers computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.core.errors import ModelRefused
from tests.families_in_memory import ModelTensors, decoder_in_memory, family_model
from workers.modeling.decoder import Decoder, empty_model
from workers.quantization.calibration import CalibrationPass, equivalence_error
from workers.quantization.evaluation import final_states
from workers.quantization.paired_pass import PairedPass

# What makes each a case of its own.
FAMILIES = {
    "llama": "states alone",
    "gemma3": "a wrapper with towers",
    "qwen3_vl": "a wrapper that computes positions of three kinds",
    "mistral3": "a wrapper",
    "llava": "a wrapper",
    "granite_docling": "a wrapper that asks for its device",
    "gemma3n_text": "four streams, positional arguments, inputs per layer, keys and values of other layers",
    "gemma4_text": "keys and values of other layers",
    "gemma4": "a wrapper around them",
    "glm_moe_dsa": "a choice of tokens that is handed on",
    "falcon": "tuples",
    "bloom": "tuples, and a norm after the embedding",
    "bamba": "tuples that are unpacked",
    "falcon_mamba": "recurrence alone",
    "falcon_h1": "tuples, factors that the model around the layers gives them",
    "gpt_oss": "sinks",
    "granitemoehybrid": "recurrent layers between others",
    "lfm2": "convolutions",
    "qwen3_next": "delta nets",
    "qwen3_5": "delta nets in a wrapper",
    "gpt2": "positional arguments",
    "olmo2": "norms behind",
    "opt": "positions in a table",
}
REFUSED = {
    "inkling2_text": "layer 7 is called with something made of earlier states",
    "hrm_text": "layer 0 is called more than once",
    "prophetnet": "layer 1 does not get what layer 0 returns",
}
CARRYING = ("gemma3n_text", "gemma4_text", "glm_moe_dsa")


def tokens(windows: int, seed: int, length: int = 24) -> Tensor:
    return torch.randint(1, 400, (windows, length), generator=torch.Generator().manual_seed(seed))


BATCHES = [tokens(3, 0), tokens(3, 1), tokens(2, 2)]  # the last one is smaller


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: carrying_model(name) for name in CARRYING}


def carrying_model(name: str) -> PreTrainedModel:
    return family_model(name, **CHANGES.get(name, {}))


CHANGES: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"grouped": False},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
}


@torch.no_grad()
def logits_of(model: PreTrainedModel, batches: list[Tensor] = BATCHES) -> list[Tensor]:
    return [model(input_ids=batch, use_cache=False).logits for batch in batches]


@torch.no_grad()
def streamed(decoder: Decoder, states: list[Tensor]) -> list[Tensor]:
    with decoder.head() as head:
        return [head(batch) for batch in states]


def worst(found: list[Tensor], expected: list[Tensor], without_layers: list[Tensor]) -> float:
    """The largest error of a batch, as a share of what the layers change."""
    shares = zip(found, expected, without_layers, strict=True)
    return max(float((a - b).norm() / (b - c).norm()) for a, b, c in shares)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    model = carrying_model(name)
    decoder = decoder_in_memory(model)
    (states,) = final_states(decoder, BATCHES, [decoder.layer_weights], lambda _: None)
    embedded = streamed(decoder, decoder.start(BATCHES)[0])
    found = streamed(decoder, states)
    assert worst(found, logits_of(model), embedded) <= 1e-5
    with decoder.head() as head, torch.no_grad():
        torch.testing.assert_close(head(states[0][1][:5]), found[0][1][:5])
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def disturbed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value * 1.1 if value.dim() == 2 else value for name, value in weights.items()}


@pytest.mark.parametrize("name", CARRYING)
def test_models_that_pass_together_keep_what_layers_hand_on_apart(
    name: str, models: dict[str, PreTrainedModel]
) -> None:
    decoder = decoder_in_memory(models[name])
    assert decoder.start(BATCHES)[1].carries
    loads = [decoder.layer_weights, lambda layer: disturbed(decoder.layer_weights(layer))]
    together = final_states(decoder, BATCHES, loads, lambda _: None)
    for load, states in zip(loads, together, strict=True):
        (alone,) = final_states(decoder, BATCHES, [load], lambda _: None)
        assert all(torch.equal(a, b) for a, b in zip(states, alone, strict=True))
    assert not torch.allclose(together[0][0], together[1][0], rtol=1e-2)


@pytest.mark.parametrize("name", CARRYING)
def test_a_fold_is_checked_with_what_earlier_layers_hand_on(
    name: str, models: dict[str, PreTrainedModel]
) -> None:
    decoder = decoder_in_memory(models[name])
    run = CalibrationPass(decoder, BATCHES)
    window = CalibrationPass(decoder, [BATCHES[0][:1]])  # that serves the check alone
    assert not run.can_restore
    for layer in range(decoder.num_layers):
        weights = decoder.layer_weights(layer)
        probe = run.collect(weights).probe
        for each in (run, window):
            assert equivalence_error(each, layer, weights, probe) < 1e-4
            assert equivalence_error(each, layer, disturbed(weights), probe) > 1e-3
    (states,) = final_states(decoder, BATCHES, [decoder.layer_weights], lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(run.states, states, strict=True))


@pytest.mark.parametrize("name", CARRYING)
def test_a_copy_is_taught_with_what_its_own_layers_hand_on(
    name: str, models: dict[str, PreTrainedModel]
) -> None:
    decoder, batches = decoder_in_memory(models[name]), [tokens(4, 0), tokens(4, 1)]
    alone, shared = PairedPass(decoder, batches), PairedPass(decoder, batches)
    run = CalibrationPass(decoder, batches)
    shared.read_from(run)
    for layer in range(decoder.num_layers):
        original = decoder.layer_weights(layer)
        own = disturbed(original)
        run.collect(original)
        lesson = shared.lesson(original)
        taught = [lesson.forward(own, inputs) for inputs in lesson.inputs]
        for each in (alone, shared):
            each.advance(original, own)
        for mine, output in zip(shared.own, taught, strict=True):
            torch.testing.assert_close(output, mine, rtol=1e-4, atol=1e-4)
        for one, other in ((alone.original, shared.original), (alone.own, shared.own)):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_arguments_are_held_for_each_batch_only_where_they_depend_on_its_tokens(
    models: dict[str, PreTrainedModel],
) -> None:
    _, calls = decoder_in_memory(models["gemma3n_text"]).start(BATCHES)
    first, second = calls.recorded[0][1], calls.recorded[1][1]
    own = {key for key, value in first.items() if isinstance(value, Tensor) and value is not second[key]}
    assert own == {"per_layer_input"}
    assert not torch.equal(first["per_layer_input"], second["per_layer_input"])
    assert first["position_embeddings"][0] is second["position_embeddings"][0]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "mistral3"])
def test_towers_are_never_read(name: str) -> None:
    decoder = decoder_in_memory(family_model(name))
    tensors: Any = decoder.checkpoint
    assert isinstance(tensors, ModelTensors)
    final_states(decoder, BATCHES, [decoder.layer_weights], lambda _: None)
    with decoder.head():
        pass
    unread = tensors.tensors.keys() - tensors.read
    assert any("vision" in name or "visual" in name for name in unread)
    assert not any("vision" in name or "visual" in name for name in tensors.read)


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_layers_that_can_not_be_run_one_by_one_are_refused(name: str, why: str) -> None:
    model = family_model(name)
    with pytest.raises(
        ModelRefused, match=f"{type(model).__name__} can't be run one by one.*{why}"
    ) as refusal:
        decoder_in_memory(model).start(BATCHES)
    assert refusal.value.code == "architecture_unsupported"


def test_a_class_that_gives_no_text_is_refused() -> None:
    decoder = decoder_in_memory(family_model("llama"))
    for name in ("LlamaForSequenceClassification", "system"):
        architecture = decoder.architecture.model_copy(update={"class_name": name})
        with pytest.raises(ModelRefused, match=name) as refusal:
            empty_model(decoder.checkpoint.config, architecture, torch.float32)
        assert refusal.value.code == "architecture_unsupported"
