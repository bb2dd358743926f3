"""From tokens to text, one at a time: no half characters, no text that a stop string takes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

REPLACEMENT = "\ufffd"
# Tokens of the prompt that the first text is read with: some tokenizers strip a space at the start.
CONTEXT_TOKENS = 4
# Tokens in a row without a whole character at the end: the next would cost as many to decode.
MAX_FRESH = 64


class TokenDecoder(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of a growing sequence, in deltas that never change afterwards.

    A window of the last tokens is decoded anew each time, since tokens may share a character. It moves
    ahead whenever the text ends with a whole one.
    """

    def __init__(
        self, decoder: TokenDecoder, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self.decoder, self.skip_special_tokens = decoder, skip_special_tokens
        self.window = list(prompt[-CONTEXT_TOKENS:])
        self.fresh = 0  # tokens at the window's end that are younger than the last whole text
        context = self.text()
        if context.endswith(REPLACEMENT):
            self.window, context = [], ""
        self.emitted = len(context)

    def text(self) -> str:
        return self.decoder.decode(self.window, skip_special_tokens=self.skip_special_tokens)

    def add(self, token: int) -> str:
        """The text that the token adds; empty while a character is incomplete."""
        self.window.append(token)
        self.fresh += 1
        text = self.text()
        # A byte that can be no character any more shows when something whole follows: some tokenizers make
        # a whole run of bytes unreadable while its last character is incomplete.
        broken = len(text) - len(text.rstrip(REPLACEMENT))
        whole = len(text) - broken
        added = text[self.emitted : whole]
        self.emitted = max(self.emitted, whole)
        if self.fresh >= MAX_FRESH and (broken or not text):
            added += self.rest()
            self.window, self.fresh, self.emitted = [], 0, 0
        elif not broken and text:
            self.window = self.window[-self.fresh :]
            self.fresh = 0
            self.emitted = len(self.text())
        return added

    def rest(self) -> str:
        """The text that was held back, to be written at the end even if a character is incomplete."""
        text = self.text()
        added = text[self.emitted :]
        self.emitted = max(self.emitted, len(text))
        return added


@dataclass(frozen=True)
class StopMatch:
    """The text up to a stop string, and which it was."""

    text: str
    string: str


class StopStrings:
    """Withholds text that may be the start of a stop string."""

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self.strings, self.include = tuple(strings), include
        self.held = ""

    def add(self, text: str) -> str | StopMatch:
        """Text that is safe to send, or the match that ends the text."""
        if not self.strings:
            return text
        self.held += text
        matches = [(at, string) for string in self.strings if (at := self.held.find(string)) >= 0]
        if matches:
            at, string = min(matches)
            end = at + len(string) if self.include else at
            before, self.held = self.held[:end], ""
            return StopMatch(before, string)
        keep = max(self.partial(string) for string in self.strings)
        safe, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return safe

    def partial(self, string: str) -> int:
        """The longest end of the held text that begins `string`."""
        longest = min(len(string) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(string[:n])), 0)

    def rest(self) -> str:
        held, self.held = self.held, ""
        return held
