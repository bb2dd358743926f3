"""The artifact's tokenizer: text to tokens, tokens to text and bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from app.core.errors import ModelRefused
from workers.serving.answer_forms import AnswerForms
from workers.serving.generation_settings import end_tokens, read_settings
from workers.texts.chat_template import ChatTemplate, chat_template
from workers.texts.windows import load_tokenizer

log = logging.getLogger(__name__)


class Tokenization:
    """One tokenizer, with the model's chat templates, its generation settings and its end tokens.

    `template` is an error if the model's is invalid: only chats need one.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """Raises ModelRefused for an artifact whose tokenizer can't be used."""
        tokenizer = load_tokenizer(folder)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelRefused(
                "the tokenizer has no fast form", code="tokenizer_unsupported", remedy="add a tokenizer.json"
            )
        self.vocabulary = vocabulary  # of the model: it may have more rows than there are tokens
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        self.settings = read_settings(folder)
        self.end_tokens = self.in_vocabulary(end_tokens(self.settings, tokenizer))
        self.template = template_or_refusal(tokenizer)
        source = self.template.source if isinstance(self.template, ChatTemplate) else ""
        self.forms = AnswerForms.of_template(source)
        added = self._fast.get_added_tokens_decoder().values()
        self.special_tokens = tuple(token.content for token in added if token.special)
        decoder = json.loads(self._fast.to_str()).get("decoder") or {}
        self._byte_level = "ByteLevel" in json.dumps(decoder)

    def in_vocabulary(self, tokens: Iterable[int]) -> frozenset[int]:
        """The tokens that the model can write."""
        return frozenset(token for token in tokens if 0 <= token < self.vocabulary)

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """`special_tokens` adds those that the tokenizer puts around a text; a chat template has its own."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def to_json(self) -> str:
        text: str = self._fast.to_str()
        return text

    def token_text(self, token: int) -> str:
        return self.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """A token's own bytes, which may be a part of a character."""
        name: str | None = self._fast.id_to_token(token)
        if name is None:
            return b""
        if self._byte_level and all(character in byte_characters() for character in name):
            return bytes(byte_characters()[character] for character in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # SentencePiece's bytes
            return bytes([int(name[3:5], 16)])
        return self.token_text(token).encode()


def template_or_refusal(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | ModelRefused:
    try:
        return chat_template(tokenizer)
    except ModelRefused as refusal:
        log.warning("chats will be refused: %s", refusal)
        return refusal


@lru_cache(maxsize=1)
def byte_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers (GPT-2 and its successors) write bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return {**characters, **{chr(256 + index): byte for index, byte in enumerate(others)}}
