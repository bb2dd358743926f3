"""Drawing tokens: each rule against its definition, and rows that don't touch each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from app.core.errors import JobFault
from tests.tiny_models import TOKENIZER
from workers.serving.detokenizer import Detokenizer
from workers.serving.requests import Choice, Generation, Sampling, Sequence, StopRules
from workers.serving.sampling import choose, truncate

DECODER = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
SIZE = 8
NO_END: frozenset[int] = frozenset()
LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.03, 0.01, 0.006, 0.004]))


def sequence(prompt: tuple[int, ...] = (1,), stopping: StopRules | None = None, **sampling: Any) -> Sequence:
    generation = Generation(
        id="x", prompt=prompt, sampling=Sampling(**sampling), stopping=stopping or StopRules(4), deliver=print
    )
    return Sequence(generation, 0, Detokenizer(DECODER))


def drawn(count: int, **sampling: Any) -> Counter[int]:
    one = sequence(seed=5, **sampling)
    found = [choose(LOGITS[None], [one], NO_END)[0] for _ in range(count)]
    return Counter(choice.token for choice in found if choice is not None)


def test_temperature_1_draws_the_models_distribution() -> None:
    counts = drawn(4000)
    for token, probability in enumerate(LOGITS.exp().tolist()):
        assert abs(counts[token] / 4000 - probability) < 0.03


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.9}, {0, 1, 2}),
        ({"temperature": 0.0}, {0}),
        ({"allowed_token_ids": (6, 7)}, {6, 7}),
        ({"logit_bias": {7: 100.0}}, {7}),
    ],
)
def test_what_a_rule_keeps(rule: dict[str, Any], kept: set[int]) -> None:
    assert set(drawn(400, **rule)) == kept


def test_a_low_temperature_sharpens() -> None:
    assert drawn(500, temperature=0.2)[0] > 350


def test_a_penalty_is_subtracted_for_what_was_generated_and_not_for_the_prompt() -> None:
    one = sequence(prompt=(0, 0, 0), temperature=0.0, frequency_penalty=0.2, presence_penalty=0.2)
    tokens = []
    for _ in range(5):
        choice = choose(LOGITS[None], [one], NO_END)[0]
        assert choice is not None
        one.add(choice)
        tokens.append(choice.token)
    assert tokens == [0, 1, 0, 0, 1]


def test_repetition_counts_the_prompt() -> None:
    one = sequence(prompt=(0,), temperature=0.0, repetition_penalty=2.0)
    choice = choose(LOGITS[None], [one], NO_END)[0]
    assert choice is not None
    assert choice.token == 1


def test_an_end_is_banned_before_the_least_number_of_tokens() -> None:
    one = sequence(temperature=0.0, stopping=StopRules(4, min_tokens=1, token_ids=frozenset({1})))
    first = choose(LOGITS[None], [one], frozenset({0}))[0]
    assert first is not None
    assert first.token == 2
    one.add(first)
    second = choose(LOGITS[None], [one], frozenset({0}))[0]
    assert second is not None
    assert second.token == 0


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_neighbours_change_nothing(seed: int, count: int) -> None:
    """Every row of a batch gets what it gets alone, by whatever rules the others go."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, SIZE, generator=generator) * 3
    rules: list[dict[str, Any]] = [
        {}, {"top_p": 0.7}, {"top_k": 3}, {"temperature": 0.0}, {"min_p": 0.1}, {"presence_penalty": 1.0}
    ]  # fmt: skip
    rules = rules[:count]
    alone = [
        choose(logits[row, None], [sequence(seed=seed, **rule)], NO_END) for row, rule in enumerate(rules)
    ]
    together = choose(logits, [sequence(seed=seed, **rule) for rule in rules], NO_END)
    assert [choice and choice.token for choice in together] == [one[0] and one[0].token for one in alone]


def test_logprobs_are_the_models_own() -> None:
    one = sequence(temperature=0.0, top_logprobs=3, logit_bias={3: 50.0})
    choice = choose(LOGITS[None], [one], NO_END)[0]
    assert choice is not None
    assert choice.token == 3
    assert choice.logprob == pytest.approx(float(LOGITS[3]), abs=1e-5)
    assert [each.token for each in choice.top] == [0, 1, 2]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_fails_alone(broken: float) -> None:
    logits = torch.stack([LOGITS, LOGITS])
    logits[0, 3] = broken
    first, second = choose(logits, [sequence(), sequence(temperature=0.0)], NO_END)
    assert isinstance(first, JobFault)
    assert isinstance(second, Choice)
    assert second.token == 0


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=20), st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_it(weights: list[float], top_p: float) -> None:
    probabilities = torch.tensor(sorted(weights, reverse=True), dtype=torch.float64)
    probabilities /= probabilities.sum()
    kept = int((truncate(probabilities[None], [Sampling(top_p=top_p)]) > 0).sum())
    sums = probabilities.cumsum(0)
    assert kept >= 1
    assert float(sums[kept - 1]) >= top_p - 1e-9
    assert kept == 1 or float(sums[kept - 2]) < top_p + 1e-9
