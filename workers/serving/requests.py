"""Requests to generate text, and their state while it is generated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from torch import Tensor

from app.core.errors import NibbleError
from workers.serving.detokenizer import Detokenizer, StopStrings
from workers.serving.grammar import Matcher

GREEDY_BELOW = 1e-5  # as in vLLM: dividing by less overflows
FinishReason = Literal["stop", "length", "error", "abort"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None  # None: no logprobs at all

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def truncated(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn by the model's own scores."""
        return not (self.penalized or self.logit_bias or self.allowed_token_ids)


@dataclass(frozen=True)
class StopRules:
    """When a sequence ends."""

    max_tokens: int
    min_tokens: int = 0
    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    include_string: bool = False


@dataclass(frozen=True)
class Alternative:
    token: int
    logprob: float


@dataclass(frozen=True)
class Choice:
    """The token that was drawn, and its logprobs if they were asked for."""

    token: int
    logprob: float = math.nan
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class PromptScore(Choice):
    """One token of a prompt, given those before it; rank 1 is the most probable one."""

    rank: int = 0


@dataclass(frozen=True)
class TextDelta:
    """An update of one sequence: text to append, its tokens, and the reason if it ended."""

    index: int
    text: str
    choices: tuple[Choice, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: NibbleError | None = None  # of a delta that ends with `error`
    prompt_scores: tuple[PromptScore, ...] | None = None  # with the first delta, where they were asked for


@dataclass(frozen=True)
class Generation:
    """One request: a prompt, and how `n` sequences follow it."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stopping: StopRules
    deliver: Callable[[TextDelta], None]  # called by the engine's thread
    n: int = 1
    matcher: Matcher | None = None
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None  # alternatives to each token of the prompt; None: not scored
    arrived: float = field(default_factory=time.monotonic)


class Sequence:
    """One of the answers to a request, while it grows."""

    def __init__(self, generation: Generation, index: int, detokenizer: Detokenizer) -> None:
        self.generation, self.index, self.detokenizer = generation, index, detokenizer
        self.sampling, self.stopping = generation.sampling, generation.stopping
        self.tokens = list(generation.prompt)
        self.stops = StopStrings(self.stopping.strings, include=self.stopping.include_string)
        seed = self.sampling.seed
        self.random = Random(None if seed is None else f"{seed}/{index}")  # noqa: S311  # no secret
        self.matcher = generation.matcher.copy() if generation.matcher else None
        self.penalties: Tensor | None = (
            None  # times each token was generated, and whether it was in the prompt
        )
        self.pending: list[Choice] = []  # drawn, but their text is withheld
        self.prompt_scores: tuple[PromptScore, ...] | None = None  # not yet delivered
        self.cancelled = False
        self.finished = False
        self.last_token_at: float | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.generation.prompt)

    @property
    def drawn_alone(self) -> bool:
        """Whether its next token can be drawn before the host has seen the last one."""
        sampling = self.sampling
        follows_rules = self.matcher is not None or self.generated < self.stopping.min_tokens
        return sampling.plain and sampling.top_logprobs is None and not follows_rules

    def add(self, choice: Choice) -> None:
        """One more token."""
        self.tokens.append(choice.token)
        self.pending.append(choice)
        if self.penalties is not None:
            self.penalties[0, choice.token] += 1
            self.penalties[1, choice.token] = 1
        if self.matcher is not None:
            self.matcher.take(choice.token)
