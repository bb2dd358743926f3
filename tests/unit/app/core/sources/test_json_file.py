from __future__ import annotations

import codecs
import json

import pytest

from app.core.errors import ModelRefused
from app.core.sources.json_file import as_utf8, parse_json


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_json_is_read_in_any_utf(encoding: str) -> None:
    content = '{"name": "größe"}'.encode(encoding)
    assert parse_json("config.json", content).value == {"name": "größe"}
    written = as_utf8("config.json", content)
    assert json.loads(written.decode("utf-8")) == {"name": "größe"}
    assert not written.startswith(codecs.BOM_UTF8)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"a": ' + b"1" * 6000 + b"}", "a number has too many digits"),
        (b"[" * 200_000, "nested too deeply"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_what_is_wrong_is_said_without_advice_to_programmers(content: bytes, why: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        parse_json("x.json", content)
    assert refusal.value.message == f"x.json is not valid JSON: {why}"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 200_000, b'"text"'])
def test_what_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(ModelRefused, match=r"x\.json is not") as refusal:
        parse_json("x.json", content)
    assert refusal.value.code == "model_config_invalid"


def test_a_file_of_broken_text_is_refused() -> None:
    with pytest.raises(ModelRefused, match=r"x\.json is not utf-16"):
        as_utf8("x.json", codecs.BOM_UTF16_LE + b"\x00")


@pytest.mark.parametrize(
    ("content", "value", "code"),
    [
        (b'{"auto_map": {"AutoModel": "x.Y"}, "a": 1}', {"a": 1}, ("auto_map",)),
        (b'{"text": [{"auto_map": {"AutoModel": "x.Y"}}]}', {"text": [{}]}, ("auto_map",)),
        (b'{"text": {"trust_remote_code": true}}', {"text": {}}, ("trust_remote_code",)),
        (b'{"custom_pipelines": {"x": {"impl": "y.Z"}}}', {}, ("custom_pipelines",)),
        (b'{"auto_map": {}, "trust_remote_code": false}', {}, ()),
        (b'{"map": {"AutoModel": "x.Y"}}', {"map": {"AutoModel": "x.Y"}}, ()),
    ],
)
def test_keys_that_name_code_are_dropped_at_every_depth(
    content: bytes, value: object, code: tuple[str, ...]
) -> None:
    parsed = parse_json("config.json", content)
    assert parsed.value == value
    assert parsed.code == code
