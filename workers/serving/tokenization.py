"""The artifact's tokenizer: text to tokens, tokens to text and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from app.core.errors import ModelRefused
from workers.serving.chat_template import ChatTemplate
from workers.texts.windows import load_tokenizer


class Tokenization:
    """One tokenizer, with the model's chat template and its end tokens."""

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
        self.generation_config = read_json(folder / "generation_config.json")
        self.end_tokens = self.known(end_tokens(tokenizer, self.generation_config))
        self.template = ChatTemplate(template_source(tokenizer), special_tokens(tokenizer))
        decoder = json.loads(self._fast.to_str()).get("decoder") or {}
        self._byte_level = "ByteLevel" in json.dumps(decoder)

    def known(self, tokens: Iterable[int]) -> frozenset[int]:
        """Those that the model can write."""
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


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: dict[str, Any]) -> frozenset[int]:
    """Those that end an answer, by the model's generation settings and by the tokenizer."""
    named = generation_config.get("eos_token_id")
    found = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*found, tokenizer.eos_token_id) if isinstance(token, int))


def template_source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The model's template; of several, the one that knows tools, which holds plain messages too."""
    source: Any = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("tool_use") or source.get("default")
    return source if isinstance(source, str) else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: str(value) for name in names if (value := getattr(tokenizer, name, None)) is not None}


@lru_cache(maxsize=1)
def byte_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers (GPT-2 and its successors) write bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    found = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return {**found, **{chr(256 + place): byte for place, byte in enumerate(others)}}
