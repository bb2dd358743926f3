"""How likely models find continuations of texts, streaming: all models advance layer by layer together.

Requests of about one length pass in sections, so a task of any size needs no more memory than a section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workers.modeling.decoder import Decoder
from workers.quantization.evaluation import (
    CHUNK_TOKENS,
    HeadFunction,
    LoadWeights,
    final_states,
    log_probabilities,
    own_head,
)

SECTION_TOKENS = 65_536  # of a section, padding included: their hidden states are held for every model
FULL_BATCHES = 4  # a section that has as many is ended by a row that is LONGER than its first
LONGER = 1.25


class Continuation(NamedTuple):
    """Token ids of a text and of what shall follow it, at least one each."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What a model reads: all but the last token."""
        return (*self.context, *self.tokens[:-1])


@dataclass(frozen=True)
class Likelihoods:
    """What one model says of each request."""

    log_probability: Tensor  # (requests,) float64, nats: the sum over a continuation's tokens
    is_greedy: Tensor  # (requests,) bool: each token is the likeliest after those before it


@dataclass(frozen=True)
class Section:
    """Rows of token ids, none longer than the last, that pass through the models together."""

    rows: list[tuple[int, ...]]

    def batches(self, batch_tokens: int) -> list[Tensor]:
        """(rows, length) each. Padding stands behind a row, where no token of it looks."""
        length = len(self.rows[-1])
        padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in self.rows])
        return list(torch.split(padded, max(1, batch_tokens // length)))


def sections(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[Section]:
    """All rows, from the shortest on. Every section reads the models anew, every pad token is computed."""
    section: list[tuple[int, ...]] = []
    for row in sorted(rows, key=len):
        tokens = len(row) * (len(section) + 1)
        uneven = bool(section) and len(row) > LONGER * len(section[0])
        if section and (tokens > SECTION_TOKENS or (uneven and tokens > FULL_BATCHES * batch_tokens)):
            yield Section(section)
            section = []
        section.append(row)
    if section:
        yield Section(section)


@torch.no_grad()
def likelihoods(
    decoder: Decoder,
    requests: Sequence[Continuation],
    models: Sequence[LoadWeights],
    batch_tokens: int,
    on_share: Callable[[float], None],
) -> list[Likelihoods]:
    """The answers of each model; `on_share` gets the share of the work that is done.

    Requests that read the same tokens, such as the letters of a multiple choice, are one row.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        readers.setdefault(request.inputs, []).append(index)
    answers = [
        Likelihoods(torch.zeros(len(requests), dtype=torch.float64), torch.ones(len(requests)).bool())
        for _ in models
    ]
    num_layers, done, total = decoder.num_layers, 0, sum(map(len, readers))
    for section in sections(list(readers), batch_tokens):
        size = sum(map(len, section.rows))

        def on_layer(layer: int, done: int = done, size: int = size) -> None:
            on_share((done + size * (layer + 1) / num_layers) / total)

        batches = section.batches(batch_tokens)
        states = final_states(decoder, batches, models, on_layer)
        predictions = Predictions.of(section, batches, requests, readers)
        with decoder.head() as head:
            for load_weights, own, answer in zip(models, states, answers, strict=True):
                predictions.read(own_head(decoder, head, load_weights), own, answer)
        done += size
    return answers


@dataclass(frozen=True)
class Predictions:
    """Where the tokens of a section's requests are predicted; all (tokens,) int64."""

    batch: Tensor
    row: Tensor  # of the batch
    position: Tensor
    token: Tensor  # that shall follow
    request: Tensor

    @classmethod
    def of(
        cls,
        section: Section,
        batches: list[Tensor],
        requests: Sequence[Continuation],
        readers: dict[tuple[int, ...], list[int]],
    ) -> Predictions:
        size = batches[0].shape[0]
        entries = [
            (number // size, number % size, len(requests[index].context) - 1 + step, token, index)
            for number, row in enumerate(section.rows)
            for index in readers[row]
            for step, token in enumerate(requests[index].tokens)
        ]
        return cls(*torch.tensor(entries).unbind(dim=1))

    def read(self, head: HeadFunction, states: list[Tensor], answer: Likelihoods) -> None:
        """Add the section's requests to a model's answers, by its states of each batch."""
        for index, batch in enumerate(states):
            inside = (self.batch == index).nonzero()[:, 0]
            for chunk in torch.split(inside, CHUNK_TOKENS):
                token = self.token[chunk].to(batch.device)
                scores = log_probabilities(head, batch[self.row[chunk], self.position[chunk]])
                chosen = scores.gather(1, token[:, None])[:, 0].double().cpu()
                missed = self.request[chunk][(scores.argmax(dim=1) != token).cpu()]
                answer.log_probability.index_add_(0, self.request[chunk], chosen)
                answer.is_greedy[missed] = False
