"""Streamed log-likelihoods of continuations against transformers' own model, one request at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_models import fitted_architecture, random_model, save_model
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.quantization import continuations
from workers.quantization.continuations import Continuation, likelihoods, sections

MODELS = {
    "llama": ("llama", {}),
    "mistral with a sliding window": ("mistral", {"sliding_window": 8}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
}


def some_requests(count: int, seed: int = 0) -> list[Continuation]:
    """Of every length up to 60; each second one asks for another end of what the one before it reads."""
    dice = random.Random(seed)
    requests = []
    for _ in range(count // 2):
        tokens = [dice.randrange(4096) for _ in range(dice.randint(2, 60))]
        cut = dice.randint(1, len(tokens) - 1)
        request = Continuation(tuple(tokens[:cut]), tuple(tokens[cut:]))
        requests += [request, request._replace(tokens=(*request.tokens[:-1], dice.randrange(4096)))]
    return requests


@torch.no_grad()
def by_transformers(model: PreTrainedModel, request: Continuation) -> tuple[float, bool]:
    logits = model(input_ids=torch.tensor([request.inputs])).logits[0].double().log_softmax(dim=-1)
    scores = logits[-len(request.tokens) :]
    likeliest = scores.argmax(dim=-1).tolist()
    total = sum(float(row[token]) for row, token in zip(scores, request.tokens, strict=True))
    return total, likeliest == list(request.tokens)


def decoder_of(folder: Path) -> Decoder:
    checkpoint = Checkpoint(folder)
    return Decoder(checkpoint, fitted_architecture(checkpoint), torch.device("cpu"), torch.float32)


@torch.no_grad()
def greedy_requests(model: PreTrainedModel, requests: list[Continuation]) -> list[Continuation]:
    """The same contexts, each followed by the two tokens that the model finds likeliest."""
    greedy = []
    for request in requests:
        tokens = list(request.context)
        for _ in range(2):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        greedy.append(Continuation(request.context, tuple(tokens[-2:])))
    return greedy


@pytest.mark.parametrize(("model_type", "changes"), MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("section_tokens", [100, 65_536], ids=["many sections", "one section"])
def test_answers_are_those_of_transformers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    changes: dict[str, object],
    section_tokens: int,
) -> None:
    monkeypatch.setattr(continuations, "SECTION_TOKENS", section_tokens)
    model = random_model(model_type, **changes)  # type: ignore[arg-type]
    decoder = decoder_of(save_model(model, tmp_path))
    requests = some_requests(24)
    requests += greedy_requests(model, requests[:6])
    halved = [{name: value / 2 for name, value in decoder.layer_weights(layer).items()} for layer in (0, 1)]
    shares: list[float] = []
    own, other = likelihoods(
        decoder, requests, [decoder.layer_weights, lambda layer: halved[layer]], 128, shares.append
    )
    expected = [by_transformers(model, request) for request in requests]
    torch.testing.assert_close(
        own.log_probability, torch.tensor([each for each, _ in expected]).double(), atol=2e-3, rtol=1e-4
    )
    assert own.is_greedy.tolist() == [greedy for _, greedy in expected]
    assert own.is_greedy[-6:].all()
    assert not torch.allclose(own.log_probability, other.log_probability, atol=1.0)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_sections_hold_every_row_and_bound_the_states() -> None:
    rows = [request.inputs for request in some_requests(400)]
    parts = list(sections(rows, 256))
    assert sorted(row for section in parts for row in section.rows) == sorted(rows)
    for section in parts:
        longest = len(section.rows[-1])
        assert longest == max(map(len, section.rows))
        assert longest * len(section.rows) <= continuations.SECTION_TOKENS
    padded = sum(len(section.rows[-1]) * len(section.rows) for section in parts)
    assert padded < 1.3 * sum(map(len, rows))


def test_letters_of_a_choice_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(save_model(random_model("llama"), tmp_path))
    read: list[int] = []
    final_states = continuations.final_states

    def counting(decoder, batches, models, on_layer):  # type: ignore[no-untyped-def]  # passed on as they are
        read.extend(batch.shape[0] for batch in batches)
        return final_states(decoder, batches, models, on_layer)

    monkeypatch.setattr(continuations, "final_states", counting)
    letters = [Continuation((1, 2, 3, 4), (letter,)) for letter in (10, 11, 12, 13)]
    (answers,) = likelihoods(decoder, letters, [decoder.layer_weights], 128, lambda share: None)
    assert read == [1]
    assert answers.log_probability.exp().sum() < 1
    assert len(set(answers.log_probability.tolist())) == 4
