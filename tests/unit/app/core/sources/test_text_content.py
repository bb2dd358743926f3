"""Files of text as people have them: every shape in every form, and what is said about broken ones."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import TextRefused
from app.core.jobs.submission import pinned_text
from app.core.records.specs import CalibrationSpec
from app.core.settings import Settings
from app.core.sources.git_lfs import POINTER
from app.core.sources.text_content import (
    HEAD_BYTES,
    PACKED,
    SUFFIXES,
    check_head,
    documents_of,
    text_suffix,
)
from app.core.sources.text_shapes import SHAPES, Document
from app.core.sources.text_source import open_text

TEXT = 'Straße, "quoted",\u2028\nand a second line \U0001f600'
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
USER, ASSISTANT = {"role": "user", "content": TEXT}, {"role": "assistant", "content": "yes"}
PARTS = [{"type": "text", "text": TEXT}, {"type": "text", "text": "more"}]

# What people write, and what it is read as.
ROWS: dict[str, tuple[dict[str, Any], Document]] = {
    "text": ({"text": TEXT, "source": "web"}, Document(text=TEXT)),
    "text beside what it was made of": (
        {"instruction": "a", "output": "b", "text": TEXT}, Document(text=TEXT),
    ),
    "messages": ({"messages": [USER, ASSISTANT]}, Document(messages=[USER, ASSISTANT])),
    "messages beside an empty text": (
        {"text": None, "messages": [USER, ASSISTANT]}, Document(messages=[USER, ASSISTANT]),
    ),
    **{
        f"messages beside {empty!r} as text": (
            {"text": empty, "messages": [USER, ASSISTANT]}, Document(messages=[USER, ASSISTANT]),
        )
        for empty in ("", " \n")
    },
    "conversations beside empty messages": (
        {"messages": [], "conversations": [USER, ASSISTANT]}, Document(messages=[USER, ASSISTANT]),
    ),
    "prompt beside an empty text": (
        {"text": "", "prompt": TEXT, "completion": ""},
        Document(text=TEXT, messages=[USER, {"role": "assistant", "content": ""}]),
    ),
    "an empty text alone": ({"text": ""}, Document(text="")),
    "content in parts": (
        {"messages": [{"role": "user", "content": PARTS}, ASSISTANT]},
        Document(messages=[{"role": "user", "content": PARTS}, ASSISTANT]),
    ),
    **{
        f"content with {kind}": (
            {"messages": [{"role": "user", "content": [{"type": kind, kind: "x"}, *PARTS]}, ASSISTANT]},
            Document(messages=[{"role": "user", "content": PARTS}, ASSISTANT], left_out=1),
        )
        for kind in ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video",
                     "video_url")
    },
    "a turn of images alone": (
        {"messages": [{"role": "user", "content": [{"type": "image", "text": None}] * 2}, ASSISTANT]},
        Document(messages=[{"role": "user", "content": []}, ASSISTANT], left_out=2),
    ),
    "tool calls": (
        {
            "messages": [
                USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ],
            "tools": [TOOL],
        },
        Document(
            messages=[
                USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ],
            tools=[TOOL],
        ),
    ),
    "a call without content": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": None},
        Document(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
    ),
    "the older function_call": (
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]},
        Document(
            messages=[
                USER,
                {
                    "role": "assistant", "content": None,
                    "tool_calls": [{"type": "function", "function": CALL["function"]}],
                },
            ]
        ),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": "yes"}]},
        Document(messages=[USER, ASSISTANT]),
    ),
    "sharegpt with a system text": (
        {"conversations": [{"from": "human", "value": TEXT}], "system": "Be brief."},
        Document(messages=[{"role": "system", "content": "Be brief."}, USER]),
    ),
    "sharegpt with calls and tools as JSON": (
        {
            "conversations": [
                {"from": "human", "value": TEXT},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "42"},
            ],
            "tools": json.dumps([TOOL]),
        },
        Document(
            messages=[
                USER,
                {
                    "role": "assistant", "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "42"},
            ],
            tools=[TOOL],
        ),
    ),
    "conversations of role and content": (
        {"conversations": [USER, ASSISTANT]}, Document(messages=[USER, ASSISTANT]),
    ),
    "prompt and completion": (
        {"prompt": TEXT, "completion": "yes"},
        Document(text=TEXT + "yes", messages=[USER, ASSISTANT]),
    ),
    "prompt and completion as turns": (
        {"prompt": [USER], "completion": [ASSISTANT]}, Document(messages=[USER, ASSISTANT]),
    ),
    "alpaca": (
        {"instruction": "Translate.", "input": TEXT, "output": "yes"},
        Document(
            text=f"Translate.\n\n{TEXT}\n\nyes",
            messages=[{"role": "user", "content": f"Translate.\n\n{TEXT}"}, ASSISTANT],
        ),
    ),
    "alpaca without input": (
        {"instruction": TEXT, "input": "", "output": "yes"},
        Document(text=f"{TEXT}\n\nyes", messages=[USER, ASSISTANT]),
    ),
}  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")
FORMS = {
    ".jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    ".ndjson": lambda rows: "\r\n\r\n".join(json.dumps(row) for row in rows),
    ".json": lambda rows: json.dumps(rows, indent=2),
    ".JSON": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    ".Json": lambda rows: json.dumps(rows) + "\n\n",
}


def table(rows: list[dict[str, Any]], delimiter: str) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [*rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize(("row", "document"), ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("suffix", FORMS)
def test_every_shape_in_every_form(suffix: str, row: dict[str, Any], document: Document) -> None:
    content = FORMS[suffix]([row, row]).encode()
    for name, packed in ((f"train{suffix}", content), (f"train{suffix}.GZ", gzip.compress(content, mtime=0))):
        assert list(documents_of(name, packed)) == [document, document]
        if not document.is_empty:
            check_head(name, packed, is_whole=True)


@pytest.mark.parametrize("indent", [None, 1, "\t"])
@pytest.mark.parametrize(("row", "document"), ROWS.values(), ids=list(ROWS))
def test_one_object_is_one_row_however_it_is_indented(
    row: dict[str, Any], document: Document, indent: int | str | None
) -> None:
    content = json.dumps(row, indent=indent).encode("utf-8-sig")
    assert list(documents_of("train.json", content)) == [document]
    for size in range(1, len(content), 9):
        check_head("train.json", content[:size], is_whole=False)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_every_form_in_every_encoding(name: str, encoding: str) -> None:
    row = {"text": "Straße"}
    text = {
        "a.txt": "Straße", "a.jsonl": json.dumps(row, ensure_ascii=False),
        "a.json": json.dumps([row], ensure_ascii=False), "a.csv": table([row], ","),
        "a.tsv": table([row], "\t"),
    }[name]  # fmt: skip
    assert list(documents_of(name, text.encode(encoding))) == [Document(text="Straße")]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("name", ["text", "prompt and completion", "alpaca", "alpaca without input"])
def test_tables_hold_the_shapes_of_texts(suffix: str, delimiter: str, name: str) -> None:
    row, document = ROWS[name]
    content = table([row, row], delimiter).encode("utf-8-sig")
    assert list(documents_of(f"train{suffix}", content)) == [document, document]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["text", "prompt and completion", "alpaca", "alpaca without input"])
def test_tables_have_the_separator_that_their_header_shows(suffix: str, delimiter: str, name: str) -> None:
    row, document = ROWS[name]
    content = table([{"id": "1"} | row], delimiter)
    assert list(documents_of(f"train{suffix}", content.encode())) == [document]


@pytest.mark.parametrize("line", ["sep={}\r\n", '"sep={}"\r\n', "SEP={}\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
def test_a_first_line_may_name_the_separator(line: str, delimiter: str) -> None:
    """Excel writes and reads it."""
    row, document = ROWS["alpaca"]
    content = line.format(delimiter) + table([row, row], delimiter)
    assert list(documents_of("train.csv", content.encode("utf-8-sig"))) == [document, document]
    cut = (line.format(delimiter) + f"text{delimiter}label\nx{delimiter}1{delimiter}2\n").encode()
    with pytest.raises(TextRefused, match="line 3: more cells than the header names"):
        list(documents_of("train.csv", cut))


def test_a_cell_may_be_a_book() -> None:
    assert list(documents_of("a.csv", f"text\n{'x' * 200_000}\n".encode())) == [Document(text="x" * 200_000)]


def test_files_put_one_behind_the_other_have_marks_in_the_middle() -> None:
    part = '{"text": "x"}\n'.encode("utf-8-sig")
    assert list(documents_of("a.jsonl", part + part)) == [Document(text="x")] * 2


GOOD = '{"text": "x"}\n\n'
# Line 3 of a .jsonl file: what is said about it.
BROKEN: list[tuple[object, str]] = [
    ("{not json", "not valid JSON: Expecting property name enclosed in double quotes: column 2"),
    ('{"text": "cut', "not valid JSON: Unterminated string starting at: column 10"),
    ("[" * 100_000, "not valid JSON"),
    ([], "a list instead of an object"),
    ("text alone", "a text instead of an object"),
    (7, "a number instead of an object"),
    ({"txt": "x", "label": 1}, "`txt`, `label`, but none of the fields that are read"),
    ({}, "no fields, but none"),
    ([USER, ASSISTANT], "a list of turns instead of an object with `messages`"),
    ([{"from": "human", "value": "x"}], "a list of turns instead of an object with `messages`"),
    (USER, "a turn alone instead of an object with `messages`"),
    ('{"text": "x", "id": ' + "1" * 6000 + "}", "not valid JSON: a number has too many digits"),
    ({"messages": [USER], "tools": '[{"a": ' + "1" * 6000 + "}]"},
     "`tools` is a text that is not valid JSON: a number has too many digits"),
    ({"text": 5}, "`text` is a number instead of text"),
    ({"text": None}, "`text` is null"),
    ({"text": "half \ud800"}, "`text` holds half of a character"),
    ({"prompt": "x"}, "`completion` is missing beside `prompt`"),
    ({"prompt": "x", "completion": None}, "`completion` is null beside `prompt`"),
    ({"prompt": "x", "completion": ["y"]}, "`completion` is a list instead of text"),
    ({"instruction": "x", "input": "y"}, "`output` is missing beside `instruction`"),
    ({"instruction": "x", "input": 7, "output": "y"}, "`input` is a number instead of text"),
    ({"messages": []}, "`messages` is empty"),
    ({"messages": "x"}, "`messages` is a text instead of a list of turns"),
    ({"messages": ["x"]}, "turn 1 is a text instead of an object"),
    ({"messages": [USER, {"role": "assistant"}]}, "turn 2 lacks `content`"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2 lacks `content`"),
    ({"messages": [{"content": "x"}]}, "turn 1 lacks `role`"),
    ({"messages": [{"role": 1, "content": "x"}]}, "`role` of turn 1 is a number instead of text"),
    ({"messages": [{"role": "user", "content": {}}]}, "`content` of turn 1 is an object instead of text"),
    ({"messages": [{"role": "user", "content": ["abc", "def"]}]},
     "turn 1 has a part that is a text instead of an object of `text`"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "turn 1 has a part whose `text` is null"),
    ({"messages": [{"role": "user", "content": [{"text": 5}]}]},
     "turn 1 has a part whose `text` is a number"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]},
     "turn 1 has a part that is 'file': text is read, images, audio and video are left out"),
    ({"messages": [{"role": "user", "content": [{"type": ["image"]}]}]},
     "turn 1 has a part that is ['image']: text is read"),
    ({"messages": [{"role": "user", "content": "half \ud800"}]}, "`messages` holds half of a character"),
    ({"messages": [USER], "tools": {}}, None),  # no tools
    ({"messages": [USER], "tools": "[{"}, "`tools` is a text that is not valid JSON"),
    ({"messages": [USER], "tools": ["f"]}, "`tools` is not a list of objects"),
    ({"conversations": [{"from": "human"}]}, "turn 1 lacks `value`"),
    ({"conversations": [{"value": "x"}]}, "turn 1 lacks `from`"),
    ({"conversations": [{"from": "function_call", "value": "f(x)"}]},
     "turn 1 is a function_call without JSON of a name and arguments"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "sentence"), BROKEN, ids=lambda value: str(value)[:50])
def test_a_line_that_is_not_read_is_named_with_what_it_lacks(row: object, sentence: str | None) -> None:
    is_raw = isinstance(row, str) and row[0] in "[{"
    line = row if is_raw else json.dumps(row)
    content = f"{GOOD}{line}\n{GOOD}".encode()
    if sentence is None:
        assert len(list(documents_of("a.jsonl", content))) == 3
        return
    for read in (
        lambda: list(documents_of("a.jsonl", content)),
        lambda: check_head("a.jsonl", content, is_whole=True),
        lambda: check_head("a.jsonl", content, is_whole=False),
        lambda: check_head("a.jsonl.gz", gzip.compress(content, mtime=0), is_whole=True),
    ):
        with pytest.raises(TextRefused, match=r"a\.jsonl(\.gz)?, line 3: " + re.escape(sentence)) as refusal:
            read()
        is_json = not sentence.startswith("not valid JSON")
        assert refusal.value.code == "text_malformed"
        assert refusal.value.remedy.startswith("write rows such as" if is_json else "write one JSON object")


# Whole files: what is said about them.
FILES: list[tuple[str, bytes, str]] = [
    ("a.json", b'[{"text": "x"}, {"txt": "y"}]', "a.json, entry 2: `txt`, but none of the fields"),
    ("a.json", b'[{"text": "x"},\n {"text": "y"}', "a.json: not valid JSON: Expecting ',' delimiter: line 2"),
    ("a.json", json.dumps({"data": [{"text": "x"}]}, indent=1).encode(), "a.json, entry 1: `data`, but none"),
    ("a.json", json.dumps({"data": [{"text": "x"}]}).encode(), "a.json, line 1: `data`, but none"),
    ("a.json", b'{\n "text": "x"\n', "a.json: not valid JSON: Expecting ',' delimiter: line 3"),
    ("a.json", b'{not json\n{"text": "x"}\n', "a.json, line 1: not valid JSON: Expecting property name"),
    ("a.json", b'"text"\n', "a.json, line 1: a text instead of an object"),
    ("a.jsonl", b"[\n{}\n", "a.jsonl: not valid JSON"),
    ("a.jsonl", json.dumps({"text": "x"}, indent=1).encode(), "a.jsonl, line 1: not valid JSON"),
    ("a.jsonl", (json.dumps([USER, ASSISTANT]) + "\n").encode() * 2,
     "a.jsonl, line 1: a list of turns instead of an object with `messages`"),
    ("a.jsonl", json.dumps([USER, ASSISTANT]).encode(), "a.jsonl, entry 1: a turn alone instead of an"),
    ("a.json", json.dumps([[USER, ASSISTANT]]).encode(), "a.json, entry 1: a list of turns instead of"),
    ("a.csv", b"text;label\nx;1;2\n", "a.csv, line 2: more cells than the header names"),
    ("a.csv", b"question;answer\nx;y\n", "a.csv, line 2: `question;answer`, but none of the fields"),
    ("a.csv", b'text,label\n"x\ny",1\n"x,2\n', "a.csv, line 4: not a row of a table"),
    ("a.csv", b"text,text\nx,y\n", "a.csv: the header names `text` twice"),
    ("a.tsv", b"prompt\tcompletion\t prompt\nx\ty\tz\n", "a.tsv: the header names `prompt` twice"),
    ("a.csv", b"text\nx,2\n", "a.csv, line 2: more cells than the header names"),
    ("a.csv", b"prompt,completion\nx,y\nx\n", "a.csv, line 3: `completion` is null beside `prompt`"),
    ("a.csv", b"question,answer\nx,y\n", "a.csv, line 2: `question`, `answer`, but none of the fields"),
    ("a.txt", "stra\xdfe\n".encode("latin-1"), "a.txt, line 1: not UTF-8 text"),
    ("a.jsonl", GOOD.encode() + "\xdf\n".encode("latin-1"), "a.jsonl, line 3: not UTF-8 text"),
    ("a.txt", "x".encode("utf-16") + b"\0", "a.txt, line 1: not UTF-16 text"),
    ("a.txt", b"text\nmore\0\n", "a.txt, line 2: a NUL character"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], "a.jsonl.gz is not a whole gzip file"),
    ("a.jsonl", POINTER + b"v1\noid sha256:00\nsize 5\n", "a.jsonl is a git-lfs pointer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), FILES, ids=lambda value: str(value)[:40])
def test_a_file_that_is_not_read_says_why(name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(TextRefused, match=re.escape(sentence)) as refusal:
        list(documents_of(name, content))
    assert refusal.value.code == "text_malformed"
    assert refusal.value.remedy


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_beginning_of_a_good_file_is_accepted_wherever_it_is_cut(name: str, encoding: str) -> None:
    row = json.dumps({"text": "ß" * 50}, ensure_ascii=False) + "\n"
    content = (f"text\n{row}" if name == "a.csv" else row * 40).encode(encoding)
    content = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
    for size in range(max(20, len(content) // 2), len(content), 7):
        check_head(name, content[:size], is_whole=False)


def test_a_packed_file_has_a_most_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.sources.text_content.MAX_TEXT_BYTES", 1000)
    with pytest.raises(TextRefused, match="holds more than 1000 bytes"):
        list(documents_of("a.txt.gz", gzip.compress(b"x" * 1001, mtime=0)))
    assert list(documents_of("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0))) == [Document(text="x" * 1000)]


@pytest.mark.parametrize("suffix", [suffix + packing for suffix in SUFFIXES for packing in ("", PACKED)])
def test_one_rule_says_which_names_are_read(tmp_path: Path, suffix: str) -> None:
    """The same for a submission, a copy of the file on another host, and reading it."""
    assert text_suffix(f"Train{suffix.upper()}") == suffix
    file = tmp_path / f"Train{suffix.upper()}"
    file.write_text("x")
    assert open_text(file.as_uri(), model_roots=[tmp_path]).suffix == suffix


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zip", "a.gz", "a", "a.txt.bak"])
def test_other_names_are_refused_with_those_that_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(TextRefused, match=r"must end in one of \.jsonl, ") as refusal:
        open_text((tmp_path / name).as_uri(), model_roots=[tmp_path])
    assert "to_json" in refusal.value.remedy


@pytest.mark.parametrize(
    ("content", "code"),
    [('{"txt": "x"}\n', "text_malformed"), ("\n\n", "text_empty"), ('{"text": " "}', "text_empty")],
)  # fmt: skip
def test_a_file_that_can_not_be_read_is_refused_at_submission(
    tmp_path: Path, content: str, code: str
) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    spec = CalibrationSpec(dataset=(tmp_path / "train.jsonl").as_uri())
    with pytest.raises(TextRefused, match=r"train\.jsonl") as refusal:
        pinned_text(spec, Settings(model_roots=(tmp_path,)), param="calibration")
    assert (refusal.value.code, refusal.value.param) == (code, "calibration.dataset")


def test_only_the_beginning_is_read_at_submission(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "x"}\n' * (HEAD_BYTES // 14 + 1) + '{"txt": "x"}\n')
    spec = CalibrationSpec(dataset=file.as_uri())
    assert pinned_text(spec, Settings(model_roots=(tmp_path,)), param="calibration")[0] == spec


def test_the_guide_names_every_shape_and_ending(repository: Path) -> None:
    guide = (repository / "docs" / "guides" / "texts.md").read_text("utf-8")
    for shape in SHAPES:
        assert shape.example in guide
    for suffix in (*SUFFIXES, PACKED):
        assert f"`{suffix}`" in guide


def test_columns_that_are_not_read_may_repeat() -> None:
    content = b"id,text,id,,\n1,x,2,,\n"
    assert list(documents_of("a.csv", content)) == [Document(text="x")]
