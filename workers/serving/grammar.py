"""Constrained decoding by llguidance: which tokens may follow, so that the text keeps to a grammar."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from app.core.errors import InvalidRequest
from workers.serving.constraints import Constraint

log = logging.getLogger(__name__)

# A weak model asked for JSON likes to write spaces for ever, so there is at most one between two parts.
JSON_OPTIONS: Any = {"whitespace_pattern": " ?"}
MAX_REASON = 300  # characters
# By how llguidance begins to say what is wrong.
KNOWN_KEYWORDS = "use the keywords and formats that constrained decoding knows"
REMEDIES = {
    "Unsatisfiable": "remove rules that contradict each other, and allow at least one value: no JSON fits",
    "Unimplemented": KNOWN_KEYWORDS,
    "Unknown": KNOWN_KEYWORDS,
}
OTHER_REMEDY = "correct it there"
SUBJECTS = {"schema": "JSON schema", "regex": "pattern", "choice": "choice", "grammar": "grammar"}


class Matcher:
    """How far one sequence has come in a grammar, which the field `param` of its request demands."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, param: str) -> None:
        self._matcher, self._vocabulary, self.param = matcher, vocabulary, param

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._vocabulary, self.param)

    def allowed(self) -> Tensor:
        """bool (vocabulary): the tokens that may come next; none if the grammar has failed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
        if not self.failed:  # else llguidance allows the end, after whatever came before
            mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(np.bool_)
            allowed[: mask.size] = torch.from_numpy(mask)
        return allowed

    def take(self, token: int) -> None:
        """Advance by an allowed token. Raises InvalidRequest if the grammar fails at it."""
        if not self._matcher.consume_token(token):
            raise self.failure()

    @property
    def failed(self) -> bool:
        """Whether the grammar exceeded the parser's limits; then no token is allowed."""
        return bool(self._matcher.is_error())

    def failure(self) -> InvalidRequest:
        """The error for a grammar that failed."""
        log.info("a grammar failed: %s", one_line(self._matcher.get_error()))
        return InvalidRequest(
            "the JSON schema is too large to be kept to: it has too many ways to go on at one place",
            code="invalid_json_schema",
            remedy="use a schema with fewer properties or alternatives",
            param=self.param,
        )

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete; more may still be allowed."""
        return bool(self._matcher.is_accepting())

    @property
    def complete(self) -> bool:
        """Whether the text must end here."""
        return self._matcher.is_stopped()


class Grammars:
    """Grammars over one tokenizer's tokens."""

    def __init__(self, tokenizer_json: str, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocabulary, eos_token=list(end_tokens))

    def matcher(self, constraint: Constraint) -> Matcher:
        """Raises InvalidRequest for a constraint that can't be kept to, saying what of it can't."""
        try:
            grammar = compiled(constraint)
        except Exception as fault:  # the parsers of grammars raise each their own
            raise refused(str(fault), constraint) from fault
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise refused(problem, constraint)
        return Matcher(LLMatcher(self._tokenizer, grammar, log_level=0), self.vocabulary, constraint.param)


def compiled(constraint: Constraint) -> str:
    """In llguidance's own form; a grammar may be Lark's, or GBNF as vLLM and llama.cpp read it."""
    value: Any = constraint.value
    if constraint.kind == "schema":
        return LLMatcher.grammar_from_json_schema(json.dumps(value), JSON_OPTIONS)
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if constraint.kind == "choice":
        alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
        return LLMatcher.grammar_from_lark(f"start: {alternatives}")
    return LLMatcher.grammar_from_lark(any_to_lark(value))


def one_line(why: str) -> str:
    """The parser's message in one line, without the state and the grammar that it appends."""
    return " ".join(why.partition("<state>")[0].split())[:MAX_REASON]


def refused(why: str, constraint: Constraint) -> InvalidRequest:
    remedy = next((remedy for start, remedy in REMEDIES.items() if why.startswith(start)), OTHER_REMEDY)
    is_schema = constraint.kind == "schema"
    return InvalidRequest(
        f"the {SUBJECTS[constraint.kind]} can't be kept to: {one_line(why)}",
        code="invalid_json_schema" if is_schema else "invalid_grammar",
        remedy=remedy, param=constraint.param,
    )  # fmt: skip
