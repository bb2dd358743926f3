"""Perplexity, KL and agreement with the original, streaming: all models advance layer by layer together.

Both models see the same text, so the losses are compared token by token: what makes a text hard is in both
and cancels, and the interval of the ratio is far narrower than those of the two perplexities.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from scipy.special import stdtrit
from torch import Tensor

from app.core.jobs.report import Interval, Quality
from app.core.planning.cached_attention import attention_module
from workers.modeling.cache_rounding import CacheRounder, tapped
from workers.modeling.decoder import Decoder
from workers.modeling.input_rounding import InputRounder, rounding_inputs
from workers.modeling.layer_weights import Weights
from workers.modeling.prefetch import WeightPrefetch

CHUNK_TOKENS = 256  # logits are (tokens, vocabulary): a window at once could outgrow the largest layer
CONFIDENCE = 0.95  # of intervals
# Of a layer, or of the head's step: empty there if the head is the original's.
LoadWeights = Callable[[int], Weights]


class ReadBackModel(ABC):
    """LoadWeights of files, which may say that linears round their inputs, or a cache what it holds."""

    @abstractmethod
    def __call__(self, layer: int) -> Weights: ...

    @abstractmethod
    def rounders(self, layer: int) -> Mapping[str, InputRounder]:
        """By linear, named as in the layer's files."""

    @abstractmethod
    def cache_rounder(self, layer: int) -> CacheRounder | None:
        """What rounds the layer's keys and values; None if they stay as they are."""


HeadFunction = Callable[..., Tensor]  # (tokens, hidden) to logits


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
    first, calls = decoder.start(batches)
    own_calls = [calls.fork() for _ in models]
    states = [list(first) for _ in models]
    layers = range(decoder.num_layers)
    reads = (partial(load_weights, layer) for layer in layers for load_weights in models)
    with closing(WeightPrefetch(decoder.device, reads)) as weights:
        for layer in layers:
            for model in range(len(models)):
                with (
                    decoder.layer(layer, weights.take()) as module,
                    rounding_inputs(module, rounders_of(decoder, models[model], layer)),
                    tapped(module, cache_taps(decoder, models[model], layer)),
                ):
                    states[model] = [
                        own_calls[model].of(index, layer)(module, batch)
                        for index, batch in enumerate(states[model])
                    ]
            on_layer(layer)
    return states


def rounders_of(decoder: Decoder, model: LoadWeights, layer: int) -> dict[str, InputRounder]:
    """By module of the layer: what rounds its input in this model."""
    if not isinstance(model, ReadBackModel):
        return {}
    architecture = decoder.architecture.at(layer)
    return {architecture.module_name(name): each for name, each in model.rounders(layer).items()}


def cache_taps(decoder: Decoder, model: LoadWeights, layer: int) -> dict[str, CacheRounder]:
    """By module of the layer: what rounds the keys and values that it caches in this model."""
    rounder = model.cache_rounder(layer) if isinstance(model, ReadBackModel) else None
    module = attention_module(decoder.architecture, layer)
    return {} if rounder is None or module is None else {module: rounder}


@dataclass(frozen=True)
class TokenFigures:
    """Of one model, for each predicted token: (windows, predicted tokens of a window), on the device.

    That is 17 bytes a token; the hidden states, which are there as well, have 4 for each channel.
    """

    loss: Tensor  # float64
    kl: Tensor  # float64, nats
    agrees: Tensor  # bool: the original's likeliest token is this model's, too

    @classmethod
    def of_original(cls, windows: int, predicted: int, device: torch.device) -> TokenFigures:
        """Losses to be filled in; what compares it with itself is there."""
        loss, kl = torch.zeros(2, windows, predicted, dtype=torch.float64, device=device)
        return cls(loss, kl, torch.ones(windows, predicted, dtype=torch.bool, device=device))


@torch.no_grad()
def compare(
    decoder: Decoder, batches: list[Tensor], states: list[list[Tensor]], models: Sequence[LoadWeights] = ()
) -> list[Quality]:
    """The quality of each model by its final states; the first is the original.

    `models` are the others, where one has a head of its own. Of those heads one is held at a time.
    """
    figures: dict[int, TokenFigures] = {}
    with decoder.head() as head:
        for index, load_weights in enumerate(models, start=1):
            own = own_head(decoder, head, load_weights)
            if own is not head:
                pair = [states[0], states[index]]
                figures[index] = token_figures(head, batches, pair, own)[1]
        others = [index for index in range(len(states)) if index not in figures]
        rest = token_figures(head, batches, [states[index] for index in others])
    figures |= zip(others, rest, strict=True)
    return [quality_of(figures[0], figures[index]) for index in range(len(states))]


def own_head(decoder: Decoder, head: HeadFunction, load_weights: LoadWeights) -> HeadFunction:
    """A model's own head; the original's, which is `head`, if the model's head step is empty."""
    step = decoder.architecture.head_step
    if step is None or load_weights == decoder.layer_weights:
        return head
    weights = load_weights(step.number)
    return partial(head, weights=decoder.head_weights(weights)) if weights else head


def token_figures(
    head: HeadFunction,
    batches: list[Tensor],
    states: list[list[Tensor]],
    own_head: HeadFunction | None = None,
) -> list[TokenFigures]:
    """What each model makes of each token. A chunk of logits is held for two models at a time.

    All but the first, the original, have `own_head`, or its head.
    """
    length = batches[0].shape[1] - 1
    windows = sum(batch.shape[0] for batch in batches)
    device = states[0][0].device
    figures = [TokenFigures.of_original(windows, length, device) for _ in states]
    rows = ((index, row) for index, batch in enumerate(batches) for row in range(batch.shape[0]))
    for window, (index, row) in enumerate(rows):
        targets = batches[index][row, 1:].to(device)
        for start in range(0, length, CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            expected = targets[chunk, None]
            original = log_probabilities(head, states[0][index][row, :-1][chunk])
            figures[0].loss[window, chunk] = -original.gather(1, expected)[:, 0].double()
            if len(states) == 1:
                continue
            probabilities, likeliest = original.exp(), original.argmax(dim=1, keepdim=True)
            for own, hidden in zip(figures[1:], states[1:], strict=True):
                mine = log_probabilities(own_head or head, hidden[index][row, :-1][chunk])
                terms = probabilities * (original - mine)
                own.loss[window, chunk] = -mine.gather(1, expected)[:, 0].double()
                own.kl[window, chunk] = terms.sum(dim=1, dtype=torch.float64)
                own.agrees[window, chunk] = mine.gather(1, likeliest)[:, 0] == mine.amax(dim=1)
    return figures


def quality_of(original: TokenFigures, own: TokenFigures) -> Quality:
    perplexities = [math.exp(min(float(each.loss.mean()), 700.0)) for each in (own, original)]
    ratio, agrees = exponential(interval(own.loss - original.loss)), own.agrees.double()
    return Quality(
        perplexity=perplexities[0],
        perplexity_ratio=perplexities[0] / perplexities[1],
        perplexity_ratio_interval=ratio,
        beyond_noise=None if ratio is None else not ratio.holds(1.0),
        kl=float(own.kl.mean()),
        kl_interval=interval(own.kl),
        kl_p99=percentile(own.kl, 0.99),
        top1_agreement=float(agrees.mean()),
        top1_agreement_interval=interval(agrees),
    )


def interval(tokens: Tensor) -> Interval | None:
    """Of the mean of (windows, tokens) figures; None for one window, or a figure that is no number."""
    means = tokens.mean(dim=1)
    windows = len(means)
    if windows < 2 or not bool(torch.isfinite(means).all()):
        return None
    mean, error = float(means.mean()), float(means.std(correction=1)) / math.sqrt(windows)
    reach = float(stdtrit(windows - 1, (1 + CONFIDENCE) / 2)) * error
    return Interval(standard_error=error, low=mean - reach, high=mean + reach)


def exponential(logarithm: Interval | None) -> Interval | None:
    """The interval of exp of a mean; its standard error is the logarithm's, as a share of exp of the mean."""
    if logarithm is None:
        return None
    low, high = (math.exp(min(bound, 700.0)) for bound in (logarithm.low, logarithm.high))
    return Interval(standard_error=logarithm.standard_error * math.sqrt(low * high), low=low, high=high)


def percentile(tokens: Tensor, share: float) -> float:
    """The smallest figure that at least `share` of the tokens do not exceed."""
    figures = tokens.flatten()
    return float(figures.kthvalue(math.ceil(share * len(figures))).values)


def log_probabilities(head: HeadFunction, states: Tensor) -> Tensor:
    """(tokens, hidden) to float32 (tokens, vocabulary)."""
    return torch.log_softmax(head(states).to(torch.float32), dim=-1)
