"""Constrained decoding by llguidance: which tokens may follow, so that the text keeps to a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from app.core.errors import InvalidRequest

# A weak model asked for JSON likes to write spaces for ever, so there is at most one between two parts.
JSON_OPTIONS: Any = {"whitespace_pattern": " ?"}


class Matcher:
    """How far one sequence has come in a grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._vocabulary)

    def allowed(self) -> Tensor:
        """bool (vocabulary): the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(np.bool_)
        found = torch.zeros(self._vocabulary, dtype=torch.bool)
        found[: mask.size] = torch.from_numpy(mask)
        return found

    def take(self, token: int) -> None:
        """Raises ValueError if the grammar does not allow the token: `allowed` was not heeded."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"the grammar does not allow token {token}: {self._matcher.get_error()}")

    @property
    def complete(self) -> bool:
        """True if nothing but the end may follow."""
        return self._matcher.is_stopped()


class Grammars:
    """Grammars over one tokenizer's tokens."""

    def __init__(self, tokenizer_json: str, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocabulary, eos_token=list(end_tokens))

    def json_schema(self, schema: dict[str, Any], param: str) -> Matcher:
        """Raises InvalidRequest for a schema that can't be kept to, naming the part that can't."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), JSON_OPTIONS)
        except ValueError as fault:
            raise refused(str(fault), param) from fault
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise refused(problem, param)
        return Matcher(LLMatcher(self._tokenizer, grammar), self.vocabulary)


def refused(why: str, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"the JSON schema can't be kept to: {why.strip()}",
        code="invalid_json_schema", remedy="use the keywords that constrained decoding knows", param=param,
    )  # fmt: skip
