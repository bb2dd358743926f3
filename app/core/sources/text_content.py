"""A text file's bytes to documents: which names are read, packing, encoding, rows.

    .txt             one document
    .jsonl .ndjson   one JSON object a line
    .json            an array of objects, one object, or one object a line
    .csv .tsv        a header with the names of the fields, a row each
    .gz behind these

A row has one of the shapes of `app.core.sources.text_shapes`.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from app.core.errors import TextRefused
from app.core.sources.git_lfs import REMEDY, is_pointer
from app.core.sources.json_file import json_fault
from app.core.sources.text_shapes import FIELDS, SHAPES, Document, RowRefused, document_of

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
PACKED = ".gz"
MAX_TEXT_BYTES = 1024**3
HEAD_BYTES = 1024**2  # of a file are looked at before a job is accepted
DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}  # the first where the header names no field by any of them
SEPARATOR_LINE = re.compile(r"""["']?sep=(.)["']?\r?\n""", re.IGNORECASE)  # Excel's, before the header
GZIP = b"\x1f\x8b"
NOT_BLANK = re.compile(r"\S")
FIRST_LINE = re.compile(r"\s*(.*)")
READ_ENDINGS = f"{', '.join(SUFFIXES)}, with {PACKED} if it is packed"
# Of a file in another form, Parquet for one.
CONVERT_REMEDY = (
    'write it as .jsonl: datasets.load_dataset("parquet", data_files="FILE")["train"].to_json("FILE.jsonl"), '
    'or pandas.read_parquet("FILE").to_json("FILE.jsonl", orient="records", lines=True)'
)
ROWS_REMEDY = "write rows such as " + " or ".join(shape.example for shape in SHAPES)


def text_suffix(name: str) -> str | None:
    """`.jsonl.gz` of `Train.JSONL.gz`; None for a name whose file is not read."""
    return next((end for end in endings() if name.lower().endswith(end)), None)


def endings() -> list[str]:
    return [suffix + packing for suffix in SUFFIXES for packing in ("", PACKED)]


def documents_of(name: str, content: bytes) -> Iterator[Document]:
    """Raises TextRefused for what can't be read, naming the line and what is wrong there."""
    if content.startswith(GZIP):
        content = unpacked(name, content)
    yield from documents_in(name, decoded(name, content))


def check_head(name: str, head: bytes, *, is_whole: bool) -> None:
    """Refuse a file whose first `HEAD_BYTES` show already that it can't be read."""
    if is_whole and not head.startswith(GZIP):
        documents = list(documents_of(name, head))
        if all(document.is_empty for document in documents):
            raise TextRefused(f"{name} holds no text", code="text_empty", remedy="give text with content")
        return
    if head.startswith(GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except zlib.error as fault:
            raise broken_packing(name, fault) from fault
    # Of the other forms a part says nothing.
    text = decoded(name, head[: head.rfind(b"\n") + 1], of_part=True)
    if text_form(name) == "rows" and not is_one_value(name, text):
        for _ in documents_in(name, text[: text.rfind("\n") + 1]):
            pass


def text_form(name: str) -> str:
    """How a file of this name is divided: text, table or rows."""
    return {".txt": "text", ".csv": "table", ".tsv": "table"}.get(plain_suffix(name), "rows")


def plain_suffix(name: str) -> str:
    return (text_suffix(name) or ".txt").removesuffix(PACKED)


def documents_in(name: str, text: str) -> Iterator[Document]:
    form = text_form(name)
    if form == "text":
        yield Document(text=text)
        return
    rows = table_rows(name, text) if form == "table" else json_rows(name, text)
    for position, row in rows:
        try:
            yield document_of(row)
        except RowRefused as refusal:
            raise refused(f"{name}, {position}: {refusal}", ROWS_REMEDY) from refusal


def json_rows(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """The position and value of each row."""
    if is_one_value(name, text):
        value = parsed(name, text)
        rows = value if isinstance(value, list) else [value]
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, start=1))
        return
    # Of a StringIO, as JSON strings may hold other line separators, such as U+2028.
    for number, line in enumerate(io.StringIO(text), start=1):
        line = line.lstrip("\ufeff").rstrip("\r\n")  # marks are where files were put one behind the other
        if line.strip():
            yield f"line {number}", parsed(f"{name}, line {number}", line)


def is_one_value(name: str, text: str) -> bool:
    """True for an array, and for an object over several lines in a .json file; else a line is a row."""
    first = FIRST_LINE.match(text)
    assert first is not None
    is_array = first[1].startswith("[")
    if is_array and not NOT_BLANK.search(text, first.end()):
        return True  # not parsed here: it may be the whole file
    try:
        json.loads(first[1])
    except json.JSONDecodeError as fault:
        goes_on = fault.pos >= len(first[1].rstrip())
        return is_array or (goes_on and plain_suffix(name) == ".json")
    except (ValueError, RecursionError):
        return is_array
    return False


def parsed(location: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as fault:
        why = json_fault(fault).replace("line 1 column", "column")
    raise refused(f"{location}: not valid JSON: {why}", "write one JSON object a line, or one array")


def table_rows(name: str, text: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The rows of a table by the names in its header; a missing cell is None."""
    csv.field_size_limit(MAX_TEXT_BYTES)  # a cell may be a book
    separator = SEPARATOR_LINE.match(text)
    delimiter = separator[1] if separator else delimiter_of(name, text)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        if separator:
            next(reader.reader)
        fields = [field.strip() for field in reader.fieldnames or ()]
        twice = sorted(field for field in FIELDS.intersection(fields) if fields.count(field) > 1)
        if twice:
            raise refused(
                f"{name}: the header names `{twice[0]}` twice",
                "keep one column of that name, and rename the other",
            )
        reader.fieldnames = fields
        line = reader.line_num + 1
        for row in reader:
            if None in row:
                raise refused(f"{name}, line {line}: more cells than the header names", QUOTING)
            yield f"line {line}", row
            line = reader.line_num + 1
    except csv.Error as fault:
        raise refused(f"{name}, line {line}: not a row of a table: {fault}", QUOTING) from fault


def delimiter_of(name: str, text: str) -> str:
    """The usual one of its ending, or another by which the header names a field that is read."""
    usual = DELIMITERS[plain_suffix(name)]
    for delimiter in usual:
        with contextlib.suppress(csv.Error, StopIteration):
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
            if FIELDS.intersection(field.strip() for field in header):
                return delimiter
    return usual[0]


QUOTING = "put cells with separators, quotes or line breaks into double quotes, and double the quotes in them"


def unpacked(name: str, content: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            plain = file.read(MAX_TEXT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as fault:
        raise broken_packing(name, fault) from fault
    if len(plain) > MAX_TEXT_BYTES:
        raise refused(f"{name} holds more than {MAX_TEXT_BYTES} bytes", "give a part of it")
    return plain


def broken_packing(name: str, fault: Exception) -> TextRefused:
    return refused(f"{name} is not a whole gzip file: {fault}", "pack it again")


def decoded(name: str, content: bytes, *, of_part: bool = False) -> str:
    """The text in UTF-8, or in the encoding that a byte-order mark or its first characters show."""
    if is_pointer(content):
        raise refused(f"{name} is a git-lfs pointer, not the file itself", REMEDY)
    encoding = json.detect_encoding(content)
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(content, final=not of_part)
    except UnicodeDecodeError as fault:
        where = f"{name}, line {content[: fault.start].count(10) + 1}"
        as_what = encoding.removesuffix("-sig").upper()
        raise refused(f"{where}: not {as_what} text: {fault.reason}", "convert the file to UTF-8") from fault
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise refused(f"{name}, line {line}: a NUL character, so it is no text", "convert the file to UTF-8")
    return text


def refused(message: str, remedy: str) -> TextRefused:
    return TextRefused(message, code="text_malformed", remedy=remedy)
