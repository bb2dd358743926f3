"""Every command against a running service: what it refuses is said in the terminal's words, with a way out.

The commands and their options are those of the command line, so that new ones fall under these tests.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from app.cli import build
from app.core.access.api_keys import Scope
from tests.integration.api_service import ADMIN_KEY, MODEL, Service
from tests.unit.app.api.test_errors import PYDANTICS
from tests.unit.app.canned import run
from tests.unit.app.commands.test_remedies import HEADER, ROUTE
from tests.unit.app.test_cli_contract import WITHOUT_SERVICE, Command, every_command

# What stands for an id, and for what else must be given; a metavar that is new here fails these tests.
IDS = {
    "JOB": "job", "ARTIFACT": "art", "NAME": "dep", "DATASET": "ds", "KEY_ID": "key", "WEBHOOK": "msg",
    "JOB|ARTIFACT...": "job", "JOB|ARTIFACT|NAME": "art",
}  # fmt: skip
WORDS = {
    "MODEL": MODEL, "REPO": "org/name", "N": "2", "TAG...": "production", "ALIAS...": "other",
    "TENANT": "team", "FILE": "train.jsonl", "--name": "tiny", "--scopes": "jobs:read", "--gpu": "h100",
    "--out": "out",
}  # fmt: skip
ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
# Options whose value is anybody's: any text is one.
FREE = {
    "--name", "--message", "--branch", "--system", "--idempotency-key", "--url", "--api-key", "--tag",
    "--remove", "--out", "--key",
}  # fmt: skip
COMMAND = re.compile(r"`(nibble [^`]*)`")
Typed = dict[str, list[str]]


def asking() -> dict[str, Command]:
    return {name: command for name, command in every_command().items() if name not in WITHOUT_SERVICE}


def words_of(command: Command, id_of: Callable[[str], str]) -> list[str]:
    """What a command needs to be given, with an id for each that it takes."""
    words = []
    for param in command.params:
        metavar, option = str(param.metavar), param.opts[0]
        if param.param_type_name == "argument":
            if metavar in IDS:
                words.append(id_of(IDS[metavar]))
            elif param.required or metavar in ("MODEL", "TAG..."):
                words.append(WORDS[metavar])
            elif param.name == "prompt":
                words.append("hello")
        elif param.required:
            words += [option, WORDS[option]]
        elif "--yes" in param.opts:
            words.append("--yes")
    return words


def takes_id(command: Command) -> bool:
    return any(param.metavar in IDS for param in command.params if param.param_type_name == "argument")


@pytest.fixture
def here(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Service:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setenv("NIBBLE_URL", service.url)
    monkeypatch.setenv("NIBBLE_API_KEY", ADMIN_KEY)
    return service


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says that ends with such a code: no word of the API, and nothing on stdout."""

    def refuse(codes: int | tuple[int, ...], *words: str) -> str:
        assert run(*words) in (codes if isinstance(codes, tuple) else (codes,)), (words, capsys.readouterr())
        shown = capsys.readouterr()
        assert shown.out == "", words
        assert not ROUTE.search(shown.err), (words, shown.err)
        assert not HEADER.search(shown.err), (words, shown.err)
        assert not PYDANTICS.search(shown.err), (words, shown.err)
        return shown.err

    return refuse


def parsed(line: str) -> None:
    """Fails unless the line is a command with options that exist."""
    command: Any = typer.main.get_command(build())
    words = shlex.split(line)[1:]
    while isinstance(command, TyperGroup) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= names | {"--help", "--version"}, line
    assert not (isinstance(command, TyperGroup) and words and not words[0].startswith("-")), line


def test_an_id_that_nothing_has(here: Service, refused: Callable[..., str]) -> None:
    forms: tuple[Callable[[str], str], ...] = (lambda kind: "nope", lambda kind: f"{kind}_{ULID}")
    for form in forms:
        for name, command in asking().items():
            if takes_id(command):
                said = refused(1, *name.split(), *words_of(command, form))
                assert form("art") in said or ULID in said, said
                assert COMMAND.search(said), (name, said)
                for line in COMMAND.findall(said):
                    parsed(line)


def test_the_first_of_its_kind_is_missing(here: Service, refused: Callable[..., str]) -> None:
    for name, command in asking().items():
        if takes_id(command) and name != "keys revoke":  # the service has a key: the one that asks
            said = refused(1, *name.split(), *words_of(command, lambda kind: "last"))
            assert re.search(r"there is no \w+ yet \[\w+_not_found\]", said), (name, said)
            for line in COMMAND.findall(said):
                parsed(line)


def test_no_service_answers(here: Service, refused: Callable[..., str]) -> None:
    for name, command in asking().items():
        words = words_of(command, lambda kind: f"{kind}_{ULID}")
        said = refused(3, *name.split(), *words, "--url", "http://127.0.0.1:9")
        assert "`nibble up`" in said, (name, said)


@pytest.mark.parametrize(("key", "code"), [("nib_wrong", "api_key_unknown"), ("", "api_key_missing")])
def test_a_wrong_key(
    key: str, code: str, here: Service, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_API_KEY", key)
    for name, command in asking().items():
        said = refused(1, *name.split(), *words_of(command, lambda kind: f"{kind}_{ULID}"))
        assert f"[{code}]" in said, (name, said)
        assert "NIBBLE_API_KEY" in said
        assert "--api-key" in said


def test_a_key_without_the_scope(
    here: Service, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all = {"login"}
    keys = {scope: here.key(scope) for scope in (Scope.INFERENCE, Scope.JOBS_READ)}
    for name, command in asking().items():
        if name in open_to_all:
            continue
        monkeypatch.setenv("NIBBLE_API_KEY", keys[Scope.JOBS_READ if name == "chat" else Scope.INFERENCE])
        said = refused(1, *name.split(), *words_of(command, lambda kind: f"{kind}_{ULID}"))
        assert re.search(r"\[(scope_missing|tenant_forbidden)\]", said), (name, said)
        lines = COMMAND.findall(said)
        assert len(lines) == 1, (name, said)
        assert re.fullmatch(r"nibble keys create --scopes [\w:]+", lines[0]), said


def bad_values(command: Command) -> Iterator[tuple[str, list[str]]]:
    """Each option of a command that takes not just any text, and the words in which it has a bad value."""
    for param in command.params:
        option = max(param.opts, key=len)
        if param.param_type_name == "option" and not getattr(param, "is_flag", False) and option not in FREE:
            yield option, [option, "no such value"]
            if getattr(param, "min", None) is not None or option == "--since":
                yield option, [f"{option}=-1"]


def test_a_bad_value_of_an_option(here: Service, refused: Callable[..., str]) -> None:
    job = here.submit()["id"]
    artifact = here.publish(job, {"config.json": b"{}"}).id
    ids = {"job": job, "art": artifact}
    seen, unnamed = 0, []
    for name, command in asking().items():
        for option, bad in bad_values(command):
            words = words_of(command, lambda kind: ids.get(kind, f"{kind}_{ULID}"))
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
            said = refused((1, 2), *name.split(), *words, *bad)
            if option not in said or "[internal]" in said:
                unnamed.append((name, option, said))
            seen += 1
    assert unnamed == []
    assert seen > 90
