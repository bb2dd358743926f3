"""The calibration pass and the evaluation against transformers' own model."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import fitted_architecture, random_model, save_model, some_tokens
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.quantization.calibration import CalibrationPass
from workers.quantization.evaluation import compare, final_states
from workers.quantization.histograms import BINS, weight_histogram

BATCHES = [some_tokens(3, 40, 0), some_tokens(2, 40, 1)]


def decoder_of(folder: Path) -> Decoder:
    checkpoint = Checkpoint(folder)
    return Decoder(checkpoint, fitted_architecture(checkpoint), torch.device("cpu"), torch.float32)


def inputs_of(model: PreTrainedModel, linear: str) -> Tensor:
    """All rows that reach a linear of transformers' model."""
    seen: list[Tensor] = []
    hook = model.get_submodule(linear).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in BATCHES:
            model(batch, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def test_statistics_are_those_of_the_original_model(tmp_path: Path) -> None:
    model = random_model("qwen3")
    run = CalibrationPass(decoder_of(save_model(model, tmp_path)), BATCHES)
    for layer in range(2):
        collected = run.collect(run.decoder.layer_weights(layer)).groups
        for group, statistics in zip(run.decoder.architecture.at(layer).groups, collected, strict=True):
            rows = inputs_of(model, f"model.layers.{layer}.{group.balance_layers[-1]}")
            assert statistics.num_tokens == len(rows) == 200
            torch.testing.assert_close(statistics.abs_mean, rows.abs().mean(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(statistics.moment, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)


def test_a_restored_pass_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    folder = save_model(random_model("llama"), tmp_path)
    straight, skipped, restored = (CalibrationPass(decoder_of(folder), BATCHES) for _ in range(3))
    straight.collect(straight.decoder.layer_weights(0))
    skipped.skip()
    restored.restore(1, straight.states)
    assert straight.layer == skipped.layer == restored.layer == 1
    moments = [
        [entry.moment for entry in run.collect(run.decoder.layer_weights(1)).groups]
        for run in (straight, skipped, restored)
    ]
    for first, second, third in zip(*moments, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_quality_is_what_transformers_measures(tmp_path: Path) -> None:
    original = random_model("llama")
    changed = random_model("llama")
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name.endswith("proj.weight"):
                parameter.add_(
                    0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    decoder = decoder_of(save_model(original, tmp_path / "original"))
    other = Checkpoint(save_model(changed, tmp_path / "changed"))
    layers: list[int] = []
    load = partial(lambda layer: other.layer_tensors(f"model.layers.{layer}."))
    states = final_states(decoder, BATCHES, [decoder.layer_weights, load], layers.append)
    qualities = compare(decoder, BATCHES, states)
    with torch.no_grad():
        first, second = (
            torch.cat([model(b, use_cache=False).logits[:, :-1].flatten(0, 1) for b in BATCHES])
            .double().log_softmax(-1)
            for model in (original, changed)
        )  # fmt: skip
    targets = torch.cat([batch[:, 1:].flatten() for batch in BATCHES])[:, None]
    for quality, logs in zip(qualities, (first, second), strict=True):
        assert quality.perplexity == pytest.approx(math.exp(-logs.gather(1, targets).mean()), rel=1e-5)
    assert qualities[0].kl == 0
    expected = float((first.exp() * (first - second)).sum(dim=1).mean())
    assert expected > 0
    assert qualities[1].kl == pytest.approx(expected, rel=1e-3)
    assert layers == [0, 1]


def test_histograms_count_every_weight() -> None:
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    histogram = weight_histogram("x", weight)
    edges = torch.linspace(histogram.low, histogram.high, BINS + 1)
    assert sum(histogram.counts) == 1500
    expected = torch.histogram(weight, edges).hist
    # A weight next to an edge may fall to either side of it in float32.
    assert (torch.tensor(histogram.counts) - expected).abs().max() <= 1
    assert histogram.percentiles["p50"] == pytest.approx(float(weight.quantile(0.5)))


def test_a_constant_weight_has_a_histogram() -> None:
    histogram = weight_histogram("x", torch.full((4, 4), 0.5))
    assert sum(histogram.counts) == 16
    assert histogram.low == histogram.high == 0.5
