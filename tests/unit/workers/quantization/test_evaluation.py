"""Figures of the evaluation and their intervals, beside numpy, scipy and a bootstrap over the windows."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from workers.quantization.evaluation import CHUNK_TOKENS, compare, interval, percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from app.core.jobs.report import Quality
    from workers.modeling.decoder import Decoder

HIDDEN, VOCABULARY, WINDOWS, LENGTH = 8, 50, 60, 13


class Head:
    """A decoder of which only the head is used."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.linear = nn.Linear(HIDDEN, VOCABULARY, bias=False).eval()

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        yield self.linear

    def compare(self, tokens: Tensor, *states: Tensor, batch: int = 7) -> list[Quality]:
        batches = list(tokens.split(batch))
        return compare(
            cast("Decoder", self), batches, [list(each.split(batch)) for each in states]
        )  # fmt: skip

    def log_probabilities(self, states: Tensor) -> np.ndarray[Any, Any]:
        """(windows, predicted tokens, vocabulary) in float64."""
        with torch.no_grad():
            logits = self.linear.double()(states[:, :-1].double())
        self.linear.float()
        return np.asarray(logits.log_softmax(-1))


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, of which a window has mostly one, states of an original, and states of another model.

    What it changes is alike in all of a window, so that the losses of a window change together.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=generator)
    usual = torch.rand(WINDOWS, LENGTH, generator=generator) < 0.8
    tokens = torch.where(usual, tokens[:, :1], tokens)
    states = 3 * torch.randn(WINDOWS, LENGTH, HIDDEN, generator=generator)
    shift = torch.randn(WINDOWS, 1, HIDDEN, generator=generator)  # the same for all tokens of a window
    noise = torch.randn(WINDOWS, LENGTH, HIDDEN, generator=generator)
    return tokens, states, states + shift + 0.5 * noise


def test_figures_are_those_of_numpy() -> None:
    tokens, states, changed = example()
    head = Head()
    original, quality = head.compare(tokens, states, changed)
    first, second = head.log_probabilities(states), head.log_probabilities(changed)
    targets = tokens[:, 1:].numpy()[:, :, None]
    losses = [-np.take_along_axis(logs, targets, axis=2)[:, :, 0] for logs in (first, second)]
    kl = (np.exp(first) * (first - second)).sum(axis=2)
    agrees = first.argmax(axis=2) == second.argmax(axis=2)
    assert original.perplexity == pytest.approx(math.exp(losses[0].mean()), rel=1e-5)
    assert quality.perplexity_ratio == pytest.approx(math.exp((losses[1] - losses[0]).mean()), rel=1e-5)
    assert quality.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert quality.kl_p99 == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=1e-4)
    assert 0.2 < agrees.mean() < 0.9
    assert quality.top1_agreement == pytest.approx(agrees.mean())
    degrees = WINDOWS - 1
    for found, per_token, shown in (
        (quality.kl_interval, kl, lambda value: value),
        (quality.top1_agreement_interval, agrees, lambda value: value),
        (quality.perplexity_ratio_interval, losses[1] - losses[0], math.exp),
    ):
        means = per_token.mean(axis=1)
        error = math.sqrt(((means - means.mean()) ** 2).sum() / (WINDOWS * degrees))
        low, high = stats.t.interval(0.95, degrees, means.mean(), error)
        assert found is not None
        assert (found.low, found.high) == pytest.approx((shown(low), shown(high)), rel=1e-4)
        scale = math.exp(means.mean()) if shown is math.exp else 1.0
        assert found.standard_error == pytest.approx(scale * error, rel=1e-4)


def test_the_standard_error_is_that_of_a_bootstrap_over_windows() -> None:
    """An error from single tokens would be too small: it misses what the tokens of a window share."""
    tokens, states, changed = example()
    head = Head()
    targets = tokens[:, 1:].numpy()[:, :, None]
    first, second = (
        np.take_along_axis(head.log_probabilities(each), targets, axis=2)[:, :, 0]
        for each in (states, changed)
    )
    found = head.compare(tokens, states, changed)[1].perplexity_ratio_interval
    assert found is not None
    differences, random = first - second, np.random.default_rng(0)
    drawn = differences.mean(axis=1)[random.integers(WINDOWS, size=(4000, WINDOWS))]
    resampled = np.exp(drawn.mean(axis=1))
    assert found.standard_error == pytest.approx(resampled.std(), rel=0.1)
    assert (found.low, found.high) == pytest.approx(np.quantile(resampled, (0.025, 0.975)), rel=0.1)
    of_tokens = math.exp(differences.mean()) * differences.std() / math.sqrt(differences.size)
    assert of_tokens < 0.75 * found.standard_error


def test_the_paired_interval_is_narrower_than_those_of_the_two_perplexities() -> None:
    """Hard text is hard for both models."""
    tokens, states, _ = example()
    head = Head()
    nearly = states + 0.01 * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    paired = head.compare(tokens, states, nearly)[1].perplexity_ratio_interval
    losses = -torch.from_numpy(head.log_probabilities(states)).gather(2, tokens[:, 1:, None])[:, :, 0]
    own = interval(losses)
    assert paired is not None
    assert own is not None
    assert 0 < paired.standard_error < 0.05 * own.standard_error


def test_the_original_is_no_different_from_itself() -> None:
    tokens, states, _ = example()
    for quality in Head().compare(tokens, states, states.clone()):
        assert (quality.perplexity_ratio, quality.kl, quality.kl_p99, quality.top1_agreement) == (1, 0, 0, 1)
        assert quality.perplexity_ratio_interval is not None
        assert (quality.perplexity_ratio_interval.low, quality.perplexity_ratio_interval.high) == (1, 1)
        assert quality.beyond_noise is False


def test_figures_do_not_depend_on_batches_nor_on_other_models() -> None:
    tokens, states, changed = example()
    head = Head()
    alone = head.compare(tokens, states, changed)[1]
    assert head.compare(tokens, states, states + 1, changed, batch=WINDOWS)[2] == alone


def test_a_much_worse_model_is_beyond_noise() -> None:
    tokens, states, _ = example()
    quality = Head().compare(tokens, states, 3 * states)[1]
    assert quality.perplexity_ratio > 2
    assert quality.beyond_noise is True


def test_one_window_has_no_interval() -> None:
    tokens, states, changed = (each[:1] for each in example())
    quality = Head().compare(tokens, states, changed)[1]
    assert quality.perplexity_ratio != 1
    assert quality.beyond_noise is None
    assert quality.perplexity_ratio_interval is quality.kl_interval is None


def test_a_model_that_gives_no_numbers_has_no_interval() -> None:
    tokens, states, _ = example()
    quality = Head().compare(tokens, states, torch.full_like(states, math.nan))[1]
    assert math.isnan(quality.perplexity)
    assert math.isnan(quality.kl)
    assert quality.beyond_noise is None
    assert quality.perplexity_ratio_interval is quality.kl_interval is None


def test_long_windows_are_looked_at_in_chunks() -> None:
    generator = torch.Generator().manual_seed(2)
    length = 2 * CHUNK_TOKENS + 3
    tokens = torch.randint(VOCABULARY, (2, length), generator=generator)
    states = torch.randn(2, length, HIDDEN, generator=generator)
    changed = states + 0.3
    head = Head()
    first, second = head.log_probabilities(states), head.log_probabilities(changed)
    quality = head.compare(tokens, states, changed)[1]
    assert quality.kl == pytest.approx((np.exp(first) * (first - second)).sum(axis=2).mean(), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 20_000])
def test_99_percent_of_the_tokens_are_at_most_the_percentile(count: int) -> None:
    figures = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    found = percentile(figures, 0.99)
    assert found == np.quantile(figures.numpy(), 0.99, method="inverted_cdf")
    assert (figures <= found).double().mean() >= 0.99
