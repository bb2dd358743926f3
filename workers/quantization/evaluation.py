"""Perplexity and KL against the original, streaming: all models advance layer by layer together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from workers.modeling.decoder import Decoder
from workers.modeling.prefetch import WeightPrefetch

CHUNK_TOKENS = 256  # logits are (tokens, vocabulary): a window at once could outgrow the largest layer
LoadWeights = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Quality:
    """Over all predicted tokens of the evaluation windows."""

    perplexity: float  # exp of the mean loss
    kl: float  # mean KL(original || this), nats; 0 for the original


@torch.no_grad()
def final_states(
    decoder: Decoder,
    batches: list[Tensor],
    models: Sequence[LoadWeights],
    on_layer: Callable[[int], None],
) -> list[list[Tensor]]:
    """Hidden states after the last layer: per model, per batch.

    batches: (batch, sequence_length) token ids each. On a GPU the next model's layer is read, and where it
    is packed unpacked, while the present one computes.
    """
    first, arguments = decoder.start(batches)
    states = [list(first) for _ in models]
    layers = range(decoder.num_layers)
    reads = (partial(load_weights, layer) for layer in layers for load_weights in models)
    with closing(WeightPrefetch(decoder.device, reads)) as weights:
        for layer in layers:
            for model in range(len(models)):
                with decoder.layer(layer, weights.take()) as module:
                    states[model] = [
                        decoder.advance(module, batch, arguments[batch.shape[0]][layer])
                        for batch in states[model]
                    ]
            on_layer(layer)
    return states


@torch.no_grad()
def compare(decoder: Decoder, batches: list[Tensor], states: list[list[Tensor]]) -> list[Quality]:
    """The quality of each model by its final states; the first is the original."""
    with decoder.head() as head:
        return measure(head, batches, states)


def measure(head: nn.Module, batches: list[Tensor], states: list[list[Tensor]]) -> list[Quality]:
    loss = torch.zeros(len(states), dtype=torch.float64)
    divergence = torch.zeros(len(states), dtype=torch.float64)
    num_tokens = 0
    for index, batch in enumerate(batches):
        for row in range(batch.shape[0]):
            targets = batch[row, 1:]
            num_tokens += targets.numel()
            for start in range(0, targets.numel(), CHUNK_TOKENS):
                chunk = slice(start, start + CHUNK_TOKENS)
                expected = targets[chunk].to(states[0][index].device)
                original = log_probabilities(head, states[0][index][row, :-1][chunk])
                for model, own in enumerate(states):
                    mine = original if model == 0 else log_probabilities(head, own[index][row, :-1][chunk])
                    loss[model] -= mine.gather(1, expected[:, None]).sum(dtype=torch.float64).cpu()
                    if model:
                        terms = original.exp() * (original - mine)
                        divergence[model] += terms.sum(dtype=torch.float64).cpu()
    means = (loss / num_tokens).tolist()
    return [
        Quality(perplexity=math.exp(min(mean, 700.0)), kl=kl)
        for mean, kl in zip(means, (divergence / num_tokens).tolist(), strict=True)
    ]


def log_probabilities(head: nn.Module, states: Tensor) -> Tensor:
    """(tokens, hidden) to float32 (tokens, vocabulary)."""
    return torch.log_softmax(head(states).to(torch.float32), dim=-1)
