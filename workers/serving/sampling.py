"""The next token of each sequence of a batch, by each request's own rules."""

from __future__ import annotations

import math
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from app.core.errors import InvalidRequest, JobFault, NibbleError
from workers.serving.requests import Alternative, Choice, Sampling, Sequence

NOT_FINITE = "the model's output is not finite (NaN or infinity); serve it in bfloat16 or float32"

# A token; or an error that ends the sequence; or None: the grammar is complete, and the text ends here.
Next = Choice | NibbleError | None


class Drawn:
    """Tokens that the device has drawn, on their way to the host."""

    def __init__(self, tokens: Tensor, broken: Tensor) -> None:
        """int64 and bool (sequences)."""
        numbers = torch.where(broken, -1, tokens)
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def choices(self) -> list[Next]:
        """As of `choose`; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [not_finite() if token < 0 else Choice(token) for token in self._numbers.tolist()]


def draw_ahead(logits: Tensor, sequences: Several[Sequence]) -> tuple[Tensor, Drawn] | None:
    """The tokens (sequences), there and on their way; None if a sequence's rules need the host first."""
    if not all(sequence.drawn_alone for sequence in sequences):
        return None
    tokens = draw(logits, sequences)
    return tokens, Drawn(tokens, ~torch.isfinite(logits.amax(-1)))


def not_finite() -> JobFault:
    return JobFault(NOT_FINITE, code="generation_failed")


def choose(logits: Tensor, sequences: Several[Sequence], end_tokens: frozenset[int]) -> list[Next]:
    """The next token of each row of float32 logits (sequences, vocabulary), or its error.

    Every sequence draws with a generator of its own, and rows don't touch each other, so what is chosen
    does not depend on who else is in the batch.
    """
    broken = ~torch.isfinite(logits.amax(-1))
    scores = adjusted(logits, sequences, end_tokens)
    tokens = draw(scores, sequences).tolist()
    chosen: list[Next] = [Choice(token) for token in tokens]
    asked = [row for row, sequence in enumerate(sequences) if sequence.sampling.top_logprobs is not None]
    for row, choice in zip(asked, with_logprobs(logits, sequences, asked, tokens), strict=True):
        chosen[row] = choice
    if scores is not logits:
        for row in rows_where(scores.amax(-1) == -math.inf):
            chosen[row] = without_choice(sequences[row])
    for row in rows_where(broken):
        chosen[row] = not_finite()
    return chosen


def rows_where(mask: Tensor) -> list[int]:
    rows: list[int] = mask.nonzero().flatten().tolist()
    return rows


def without_choice(sequence: Sequence) -> InvalidRequest | None:
    """The error for a request whose own rules leave no token; None if the text may end here."""
    matcher, sampling, stopping = sequence.matcher, sequence.sampling, sequence.stopping
    if matcher is not None and matcher.failed:
        return matcher.failure()
    if matcher is not None and matcher.may_end:
        return None
    fields = ["allowed_token_ids"] if sampling.allowed_token_ids else []
    if matcher is not None:
        fields.append(matcher.param)
    if sequence.generated < stopping.min_tokens:
        fields.append("min_tokens")
    return InvalidRequest(
        f"no token is left by {' and '.join(fields)} after {sequence.generated} generated ones",
        code="no_token_allowed",
        remedy="allow more tokens, or leave one of these fields out",
        param=next(iter(fields), None),
    )


def adjusted(logits: Tensor, sequences: Several[Sequence], end_tokens: frozenset[int]) -> Tensor:
    """Penalties, biases and bans, in the order of the OpenAI documentation and vLLM."""
    scores = logits
    for row, sequence in enumerate(sequences):
        sampling, stopping = sequence.sampling, sequence.stopping
        bans = sequence.generated < stopping.min_tokens
        if sampling.plain and not bans and sequence.matcher is None:
            continue
        if scores is logits:
            scores = logits.clone()
        if sampling.penalized:
            penalize_(scores[row], sequence)
        for token, bias in sampling.logit_bias.items():
            scores[row, token] += bias
        if bans:
            scores[row, list(end_tokens | stopping.token_ids)] = -math.inf
        if sampling.allowed_token_ids:
            others = torch.ones_like(scores[row], dtype=torch.bool)
            others[list(sampling.allowed_token_ids)] = False
            scores[row].masked_fill_(others, -math.inf)
        if sequence.matcher is not None:
            scores[row].masked_fill_(~sequence.matcher.allowed().to(scores.device), -math.inf)
    return scores


def penalize_(scores: Tensor, sequence: Sequence) -> None:
    """Lower the scores (vocabulary) of tokens that came before, in place.

    As in vLLM: presence and frequency count what was generated; repetition, which divides, the prompt too.
    """
    sampling: Sampling = sequence.sampling
    if sequence.penalties is None:
        sequence.penalties = scores.new_zeros(2, scores.shape[0])
        sequence.penalties[1, list(set(sequence.tokens))] = 1
        for token in sequence.tokens[len(sequence.generation.prompt) :]:
            sequence.penalties[0, token] += 1
    counts, seen = sequence.penalties
    if sampling.repetition_penalty != 1:
        divided = torch.where(
            scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty
        )
        # A tiny penalty divides beyond the largest float, and two infinite scores have no probabilities.
        divided.clamp_(max=torch.finfo(scores.dtype).max)
        scores.copy_(torch.where(seen.bool(), divided, scores))
    scores -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)


def draw(scores: Tensor, sequences: Several[Sequence]) -> Tensor:
    """int64 (sequences)."""
    tokens = scores.argmax(-1)
    kinds: dict[bool, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if not sequence.sampling.greedy:
            kinds.setdefault(sequence.sampling.truncated, []).append(row)
    for truncated, rows in kinds.items():
        chosen = [sequences[row] for row in rows]
        heat = [sequence.sampling.temperature for sequence in chosen]
        places = uploaded(rows, torch.int64, scores.device)
        probabilities = torch.softmax(scores[places].double() / column(heat, scores), -1)
        if truncated:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            probabilities = truncate(probabilities, [sequence.sampling for sequence in chosen])
            tokens[places] = order.gather(-1, pick(probabilities, chosen)).squeeze(-1)
        else:
            tokens[places] = pick(probabilities, chosen).squeeze(-1)
    return tokens


def truncate(probabilities: Tensor, samplings: list[Sampling]) -> Tensor:
    """Zero what min_p, top_k and top_p take away from rows sorted in descending order."""
    limit = column([sampling.min_p for sampling in samplings], probabilities)
    remaining = torch.where(probabilities < limit * probabilities[:, :1], 0.0, probabilities)
    size = probabilities.shape[-1]
    top_k = column([sampling.top_k or size for sampling in samplings], probabilities)
    remaining = torch.where(torch.arange(size, device=remaining.device) >= top_k, 0.0, remaining)
    top_p = column([sampling.top_p for sampling in samplings], probabilities)
    before = remaining.cumsum(-1) - remaining  # of more probable tokens
    return torch.where(before >= top_p * remaining.sum(-1, keepdim=True), 0.0, remaining)


def pick(probabilities: Tensor, sequences: list[Sequence]) -> Tensor:
    """(rows, 1): the column where the cumulative probability passes each sequence's own random number."""
    sums = probabilities.cumsum(-1)
    at = column([sequence.random.random() for sequence in sequences], probabilities) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).clamp_(max=probabilities.shape[-1] - 1)


def column(values: list[float] | list[int], like: Tensor) -> Tensor:
    return uploaded(values, torch.float64, like.device)[:, None]


def uploaded(values: list[float] | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host, behind what the device does already: nobody waits for it."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


def with_logprobs(
    logits: Tensor, sequences: Several[Sequence], rows: list[int], tokens: list[int]
) -> list[Choice]:
    """Choices of some rows with the model's own logprobs, before penalties and temperature."""
    if not rows:
        return []
    logprobs = torch.log_softmax(logits[rows], -1)
    most = max(sequences[row].sampling.top_logprobs or 0 for row in rows)
    best = logprobs.topk(min(most, logprobs.shape[-1]), -1)
    own = logprobs.gather(-1, torch.tensor([[tokens[row]] for row in rows], device=logits.device))
    choices = []
    for row, value, values, ids in zip(
        rows, own[:, 0].tolist(), best.values.tolist(), best.indices.tolist(), strict=True
    ):
        count = sequences[row].sampling.top_logprobs or 0
        pairs = zip(ids[:count], values[:count], strict=True)
        top = tuple(Alternative(token, logprob) for token, logprob in pairs)
        choices.append(Choice(tokens[row], value, top))
    return choices
