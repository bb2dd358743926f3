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
    """What a tokenizer must do."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of a growing sequence, in pieces that never change afterwards.

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
        self.given = len(context)

    def text(self) -> str:
        return self.decoder.decode(self.window, skip_special_tokens=self.skip_special_tokens)

    def add(self, token: int) -> str:
        """What the token adds to the text; empty while a character is incomplete."""
        self.window.append(token)
        self.fresh += 1
        text = self.text()
        # A byte that can be no character any more shows when something whole follows: some tokenizers make
        # a whole run of bytes unreadable while its last character is incomplete.
        broken = len(text) - len(text.rstrip(REPLACEMENT))
        whole = len(text) - broken
        added = text[self.given : whole]
        self.given = max(self.given, whole)
        if self.fresh >= MAX_FRESH and (broken or not text):
            added += self.rest()
            self.window, self.fresh, self.given = [], 0, 0
        elif not broken and text:
            self.window = self.window[-self.fresh :]
            self.fresh = 0
            self.given = len(self.text())
        return added

    def rest(self) -> str:
        """At the end: what was held back, broken as it is."""
        text = self.text()
        added = text[self.given :]
        self.given = max(self.given, len(text))
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
        """Text that is safe to give away, or the end."""
        if not self.strings:
            return text
        self.held += text
        found = [(at, string) for string in self.strings if (at := self.held.find(string)) >= 0]
        if found:
            at, string = min(found)
            end = at + len(string) if self.include else at
            before, self.held = self.held[:end], ""
            return StopMatch(before, string)
        keep = max(self.partial(string) for string in self.strings)
        given, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return given

    def partial(self, string: str) -> int:
        """The longest end of the held text that begins `string`."""
        longest = min(len(string) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(string[:n])), 0)

    def rest(self) -> str:
        held, self.held = self.held, ""
        return held
