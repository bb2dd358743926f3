"""No remedy that the terminal prints names a route or a field of a body."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.commands import job_options
from app.commands.remedies import (
    BY_CODE,
    FIELDS_OF_SPEC,
    OF_SPEC,
    OPTION_OF_FIELD,
    in_terminal_words,
    with_options,
)
from app.core import errors
from tests.unit.app.test_cli_contract import every_command

KEY = "send `Authorization: Bearer <key>` with a key of this service"

ROUTE = re.compile(
    r"\b(GET|POST|PUT|PATCH|DELETE) /|/v1/|openapi|Authorization|Retry-After|Prefer:|Content-Type"
)
HEADER = re.compile(r"X-Request-ID|x-api-key")
# Written by hand for programs that call the inference routes with bodies of their own.
OF_INFERENCE = (
    "workers/serving",
    "app/api/gateway.py",
    "app/api/relay.py",
    "app/core/faults/error_answers.py",
)


def texts(node: ast.expr) -> Iterator[str]:
    """What an expression may say: placeholders stand for values."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            said = [each.value if isinstance(each, ast.Constant) else "{}" for each in values]
            yield "".join(map(str, said))
        case ast.BinOp(left=left, right=right):
            yield from (first + second for first in texts(left) for second in texts(right))
        case ast.IfExp(body=body, orelse=orelse):
            yield from texts(body)
            yield from texts(orelse)


def remedies(repository: Path) -> Iterator[tuple[str, str, str]]:
    """Place, code and text of each remedy in the sources; of names also the constant of the module."""
    for part in ("app", "workers"):
        for path in sorted((repository / part).rglob("*.py")):
            name = str(path.relative_to(repository))
            if name.startswith(("app/commands", *OF_INFERENCE)):
                continue
            tree = ast.parse(path.read_text())
            constants = {
                target.id: node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                words = {word.arg: word.value for word in node.keywords}
                if "remedy" not in words:
                    continue
                said = words["remedy"]
                if isinstance(said, ast.Name):
                    said = constants.get(said.id, said)
                codes = list(texts(words["code"])) if "code" in words else []
                kind = getattr(errors, ast.unparse(node.func), None)
                codes += [kind.code] if kind is not None else []
                for text in texts(said):
                    yield f"{name}:{node.lineno}", codes[0] if codes else "", text


def test_every_remedy_speaks_of_options_and_commands(repository: Path) -> None:
    wrong, seen = [], 0
    for where, code, text in remedies(repository):
        seen += 1
        for section in ("calibration", "evaluation") if "{}." in text else ("",):
            said = in_terminal_words(code, text.replace("{}.", f"{section}.", 2) if section else text)
            names_field = any(field_named(field, said) for field in OPTION_OF_FIELD)
            needs_spec = any(re.search(rf"`{name}`", said) for name in FIELDS_OF_SPEC)
            if (
                ROUTE.search(said)
                or HEADER.search(said)
                or names_field
                or (needs_spec and OF_SPEC not in said)
            ):
                wrong.append((where, code, said))
    assert wrong == []
    assert seen > 150


def field_named(field: str, said: str) -> bool:
    name = field.rpartition(".")[2]
    own_word = "." in field and re.search(rf"\b{re.escape(field)}\b", said)
    return bool(own_word or ("_" in name and re.search(rf"(?<![\w.-]){name}\b", said)))


def test_every_field_of_an_option_is_translated() -> None:
    fields = {".".join(place) for place in job_options.PLACES.values()}
    assert fields <= OPTION_OF_FIELD.keys()
    options = {
        name for command in every_command().values() for param in command.params for name in param.opts
    }
    assert set(OPTION_OF_FIELD.values()) <= options


@pytest.mark.parametrize(
    ("code", "remedy", "said"),
    [
        ("key_not_found", "list keys with GET /v1/keys", "list keys with `nibble keys list`"),
        ("label_invalid", "write label=team=search", "write --label team=search"),
        ("api_key_unknown", KEY, BY_CODE["api_key_unknown"]),
        ("x", "nearest valid choice: symmetric true", "nearest valid choice: --symmetric"),
        ("text_too_short", "send more text, or lower calibration.num_samples or calibration.sequence_length",
         "send more text, or lower --num-samples or --sequence-length"),
        ("deadline_exceeded", "raise timeout_s, then retry", "raise --timeout, then retry"),
        ("nothing_to_quantize", "shorten `ignore`", "shorten `ignore` (in the file of --spec)"),
        ("job_not_found", "`nibble jobs` and GET /v1/jobs list yours", "`nibble jobs` lists yours"),
        ("x", "", ""),
        ("x", "use another method", "use another method"),
    ],
)  # fmt: skip
def test_remedies_in_terminal_words(code: str, remedy: str, said: str) -> None:
    assert in_terminal_words(code, remedy) == said


def test_a_message_names_a_command_once() -> None:
    message = "artifact: 'x' is no id; `nibble artifacts` and GET /v1/artifacts list yours"
    assert with_options(message) == "artifact: 'x' is no id; `nibble artifacts` lists yours"
