"""A tokenizer as llama.cpp holds it: byte-level BPE whose splitting of text it knows by a name.

llama.cpp's converter finds `tokenizer.ggml.pre` by a hash of the ids of one text; here the name follows from
the rules of tokenizer.json themselves, and only rules whose ids the judge compares with llama.cpp's have one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase

from app.core.errors import ModelRefused
from app.core.sources.file_choice import TOKENIZER
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.side_files import write_side_files
from workers.texts.windows import load_tokenizer

GENERATION = "generation_config.json"
SAMPLE = "a"  # shows the tokens that are added to every text
ABSENT = "[PAD{}]"  # rows of the embedding beyond the vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, merges, and what is added to every text."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    splits: str  # tokenizer.ggml.pre
    special: SpecialVocab

    @classmethod
    def of(cls, source: Checkpoint, size: int) -> Vocabulary:
        """The tokenizer of `source`, for an embedding of `size` rows.

        Raises ModelRefused for one that llama.cpp would read otherwise.
        """
        with TemporaryDirectory() as folder:
            write_side_files(source, Path(folder), source.config)
            tokenizer = load_tokenizer(Path(folder))
            rules = rules_of(tokenizer)
            special = SpecialVocab(folder, n_vocab=size)
            special.special_token_ids |= end_of_turn(Path(folder) / GENERATION, special.special_token_ids)
        special.add_special_token = added_to_text(tokenizer)
        tokens, types = token_list(rules, size)
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]]
        return cls(tokens, types, merges, splits_name(rules), special)

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.splits)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        self.special.add_to_gguf(writer, quiet=True)


def refused(why: str) -> ModelRefused:
    return ModelRefused(
        f"the format gguf can't hold the tokenizer of this model: {why}",
        code="gguf_tokenizer_unsupported", remedy="choose the format compressed-tensors", param="formats",
    )  # fmt: skip


def rules_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json as the tokenizer works. Raises ModelRefused unless it is byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused(f"it has no {TOKENIZER}")
    rules: dict[str, Any] = json.loads(backend.to_str())
    model = rules["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece's BPE" if model.get("byte_fallback") else model.get("type")
        raise refused(f"it is {kind}, and only byte-level BPE is written")
    odd = next(
        (key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)),
        None,
    )
    if odd is not None:
        raise refused(f"its {odd} is {model[odd]!r}, which llama.cpp does not know")
    normalizer = (rules.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC":
        raise refused(f"its normalizer is {normalizer}; llama.cpp takes text as it is")
    return rules


def splits_name(rules: dict[str, Any]) -> str:
    """llama.cpp's name for the rules by which text is split before BPE. Raises ModelRefused without one."""
    # Imported here: it brings the tokenizers of several families with it.
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as BY_NAME

    rule = rules.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise refused("it does not end in plain bytes, or puts a space before every text")
    whole = bool(rules["model"].get("ignore_merges"))  # a split that is a token stays one
    if last.get("use_regex", True) and not whole:
        if not before:
            return "gpt-2"
        if [(step.get("type"), step.get("individual_digits")) for step in before] == [("Digits", True)]:
            return "smollm"
    if len(before) == 1 and not last.get("use_regex", True):
        step = before[0]
        isolates = step.get("type") == "Split" and step.get("behavior") == "Isolated"
        if isolates and not step.get("invert"):
            names = {True: ("llama-bpe", "tekken"), False: ("qwen2", "dbrx", "gpt-4o")}[whole]
            pattern = step.get("pattern", {}).get("Regex")
            name = next((name for name in names if BY_NAME[name] == pattern), None)
            if name is not None:
                return name
    raise refused("llama.cpp has no name here for the rules by which it splits text (pre_tokenizer)")


def token_list(rules: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Raises ModelRefused for tokens that the embedding lacks, or that take spaces with them."""
    texts = {number: text for text, number in rules["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for token in rules["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise refused(f"its token {token['content']!r} takes the spaces around it, or whole words alone")
        texts[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if max(texts) >= size:
        raise refused(f"it has the token {max(texts)}, and the embedding has {size} rows")
    return (
        [texts.get(number, ABSENT.format(number)) for number in range(size)],
        [types.get(number, TokenType.UNUSED) for number in range(size)],
    )


def added_to_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether a text begins and ends with a token of its own. Raises ModelRefused for any other addition."""
    plain: list[int] = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer(SAMPLE)["input_ids"]
    begin = [] if full[: len(plain)] == plain else [tokenizer.bos_token_id]
    end = [] if len(full) == len(begin) + len(plain) else [tokenizer.eos_token_id]
    if full != [*begin, *plain, *end]:
        raise refused(
            f"it adds tokens to every text other than {tokenizer.bos_token} and {tokenizer.eos_token}"
        )
    return {"bos": bool(begin), "eos": bool(end)}


def end_of_turn(generation: Path, special: dict[str, int]) -> dict[str, int]:
    """The second token that ends an answer, where generation_config.json names several."""
    if not generation.is_file():
        return {}
    ends = json.loads(generation.read_text("utf-8")).get("eos_token_id")
    others = [end for end in ends if end != special.get("eos")] if isinstance(ends, list) else []
    return {"eot": others[0]} if others else {}
