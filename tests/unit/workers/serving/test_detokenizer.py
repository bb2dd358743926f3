"""Incremental detokenization: the pieces are the text, whatever the tokens share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.tiny_models import TOKENIZER
from workers.serving.detokenizer import MAX_FRESH, REPLACEMENT, Detokenizer, StopMatch, StopStrings
from workers.serving.tokenization import byte_characters

BYTE_NAMES = {byte: character for character, byte in byte_characters().items()}


def byte_level() -> Tokenizer:
    """One token per byte and a few of two bytes: any cut through a character is possible."""
    names = [BYTE_NAMES[byte] for byte in range(256)]
    pairs = [
        BYTE_NAMES[first] + BYTE_NAMES[second] for first, second in ((0xE2, 0x82), (0x9F, 0x98), (32, 97))
    ]
    tokenizer = Tokenizer(models.BPE({name: place for place, name in enumerate(names + pairs)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As SentencePiece models: spaces are marks, the first is dropped, unknown characters are bytes."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "a", "▁a", "b"]
    model = models.BPE({name: place for place, name in enumerate(names)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
BUNDLED = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))


def streamed(tokenizer: Tokenizer, tokens: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.rest()]


@settings(deadline=None)
@given(st.text(min_size=1), st.data())
def test_any_split_of_text_into_tokens_gives_the_text(text: str, data: st.DataObject) -> None:
    content, tokens = text.encode(), []
    while content:
        known = [n for n in (1, 2) if split_token(content[:n]) is not None and len(content) >= n]
        length = data.draw(st.sampled_from(known))
        tokens.append(split_token(content[:length]))
        content = content[length:]
    pieces = streamed(BYTE_LEVEL, [token for token in tokens if token is not None], [])
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


def split_token(content: bytes) -> int | None:
    return BYTE_LEVEL.token_to_id("".join(BYTE_NAMES[byte] for byte in content))


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1), st.lists(st.integers(0, 255)))
def test_garbage_is_given_as_the_tokenizer_decodes_it(tokens: list[int], prompt: list[int]) -> None:
    """Bytes that are no text; a prompt before it changes nothing if it ends with a whole character."""
    whole = [*prompt, ord("x")]
    assert "".join(streamed(BYTE_LEVEL, tokens, [])) == BYTE_LEVEL.decode(tokens)
    assert "".join(streamed(BYTE_LEVEL, tokens, whole)) == BYTE_LEVEL.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(["▁the", "▁a", "b"]))))
def test_characters_as_bytes_and_words_with_marks(parts: list[str]) -> None:
    tokens: list[int] = []
    for part in parts:
        known = BYTE_FALLBACK.token_to_id(part)
        tokens += [known] if known is not None else [byte + 1 for byte in part.encode()]
    assert "".join(streamed(BYTE_FALLBACK, tokens, [])) == BYTE_FALLBACK.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(3, 4095), min_size=1, max_size=60))
def test_random_tokens_of_a_real_vocabulary(tokens: list[int]) -> None:
    assert "".join(streamed(BUNDLED, tokens, [])) == BUNDLED.decode(tokens)


def test_a_space_after_the_prompt_is_kept() -> None:
    """Alone, the decoder of such a tokenizer strips it."""
    the, a = BYTE_FALLBACK.token_to_id("▁the"), BYTE_FALLBACK.token_to_id("▁a")
    assert streamed(BYTE_FALLBACK, [a], [the]) == [" a", ""]


def test_a_character_comes_when_its_last_byte_does() -> None:
    tokens = [split_token(bytes([byte])) or 0 for byte in "é€😀".encode()]
    assert streamed(BYTE_LEVEL, tokens, []) == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_special_tokens_are_left_out_unless_wanted() -> None:
    letter = BUNDLED.token_to_id("a")
    assert streamed(BUNDLED, [0, letter, 0], []) == ["", "a", "", ""]
    shown = Detokenizer(BUNDLED, skip_special_tokens=False)
    assert shown.add(0) == "<|endoftext|>"


@pytest.mark.parametrize("token", [0x80, 0])
def test_tokens_without_text_cost_no_more_with_their_number(token: int) -> None:
    """Broken bytes for ever, or special tokens that nobody wants to see."""
    tokenizer = BYTE_LEVEL if token else BUNDLED
    longest = 0

    class Counting:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    detokenizer = Detokenizer(Counting(), [ord("x")])
    text = "".join(detokenizer.add(token) for _ in range(1000)) + detokenizer.rest()
    assert text == tokenizer.decode([token] * 1000)
    assert longest <= MAX_FRESH + 1


@settings(deadline=None)
@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_where_they_begin(text: str, strings: list[str], data: st.DataObject) -> None:
    """However the text is cut into pieces, what is given away is the text before the first stop string."""
    stops, given_away, stopped = StopStrings(strings), "", None
    rest = text
    while rest and stopped is None:
        length = data.draw(st.integers(1, len(rest)))
        added = stops.add(rest[:length])
        rest = rest[length:]
        if isinstance(added, StopMatch):
            stopped, given_away = added, given_away + added.text
        else:
            given_away += added
    if stopped is None:
        assert given_away + stops.rest() == text
        assert not any(string in text for string in strings)
    else:
        assert text.startswith(given_away + stopped.string)
        assert not any(string in given_away for string in strings)


@pytest.mark.parametrize(("include", "expected"), [(False, "so "), (True, "so END")])
def test_a_stop_string_across_pieces(include: bool, expected: str) -> None:
    stops = StopStrings(["END"], include=include)
    assert [stops.add(piece) for piece in ("so ", "E", "N")] == ["so ", "", ""]
    stopped = stops.add("D of it")
    assert isinstance(stopped, StopMatch)
    assert "so " + stopped.text == expected
    assert stopped.string == "END"


def test_what_only_looked_like_a_stop_string_is_given() -> None:
    stops = StopStrings(["END"])
    assert [stops.add("EN"), stops.add("EN"), stops.add("!"), stops.rest()] == ["", "EN", "EN!", ""]
