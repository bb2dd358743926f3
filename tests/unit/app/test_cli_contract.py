"""What holds for every command: JSON on request, help for each option, colour for people only, completion."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from app.cli import ENTRIES, build
from app.commands.examples import EXAMPLES
from tests.unit.app.canned import Canned, canned_service, run

JOB = {
    "id": "job_1", "state": "succeeded", "created_at": "2026-01-01T00:00:00Z", "spec": {"model": "a/b"},
    "artifacts": ["art_1"],
}  # fmt: skip
ARTIFACT = {
    "id": "art_1", "job": "job_1", "created_at": "2026-01-01T00:00:00Z", "model": "a/b", "format": "awq",
    "files": [],
}  # fmt: skip
PUSH = {"id": "push_1", "artifact": "art_1", "state": "pushed", "repo_id": "org/name"}
DEPLOYMENT = {
    "id": "dep_1", "name": "tiny", "artifact": "art_1", "engine": "auto", "state": "ready",
    "created_at": "2026-01-01T00:00:00Z",
}  # fmt: skip
KEY = {"id": "key_1", "tenant": "t", "created_at": "2026-01-01T00:00:00Z", "key": "secret"}
CHUNK = {"choices": [{"delta": {"content": "hello"}, "finish_reason": "stop"}], "usage": {"total_tokens": 2}}
PAGE = {"object": "list", "data": [], "has_more": False, "next": None}
EVENT = {"id": "1-1", "kind": "state", "at": "2026-01-01T00:00:00Z", "payload": {"to": "queued"}}

DATASET = {
    "id": "ds_1", "name": "train.jsonl", "created_at": "2026-01-01T00:00:00Z", "size": 9, "sha256": "ab",
    "reference": "upload:ds_1",
}  # fmt: skip
DELIVERY = {
    "id": "msg_1", "job": "job_1", "type": "job.succeeded", "url": "https://a.example", "state": "delivered",
    "created_at": "2026-01-01T00:00:00Z", "tries": [{"status": 200}],
}  # fmt: skip

ANSWERS: dict[str, tuple[int, object]] = {
    "POST /v1/jobs": (202, JOB),
    "GET /v1/jobs": (200, {**PAGE, "data": [JOB]}),
    "GET /v1/jobs/job_1": (200, JOB),
    "GET /v1/jobs/job_1/report": (200, {"model": "a/b"}),
    "GET /v1/jobs/job_1/export": (200, {"params": {}, "metrics": {}, "tags": {}, "artifacts": {}}),
    "POST /v1/jobs/job_1/cancel": (202, JOB),
    "POST /v1/jobs/job_1/retry": (202, JOB),
    "POST /v1/estimates": (200, {"candidates": []}),
    "POST /v1/recommendations": (200, {"alternatives": []}),
    "GET /v1/artifacts": (200, {**PAGE, "data": [ARTIFACT]}),
    "GET /v1/artifacts/art_1": (200, ARTIFACT),
    "PATCH /v1/artifacts/art_1": (200, ARTIFACT),
    "POST /v1/artifacts/art_1/push": (202, PUSH),
    "GET /v1/artifacts/art_1/pushes/push_1": (200, PUSH),
    "GET /v1/registry": (200, {**PAGE, "data": [{"model": "a/b", "tags": {}, "versions": [ARTIFACT]}]}),
    "POST /v1/deployments": (202, DEPLOYMENT),
    "GET /v1/deployments": (200, {**PAGE, "data": [DEPLOYMENT]}),
    "GET /v1/deployments/dep_1": (200, DEPLOYMENT),
    "PATCH /v1/deployments/dep_1": (202, DEPLOYMENT),
    "POST /v1/datasets": (201, DATASET),
    "GET /v1/datasets": (200, {**PAGE, "data": [DATASET]}),
    "GET /v1/datasets/ds_1": (200, DATASET),
    "DELETE /v1/datasets/ds_1": (204, None),
    "GET /v1/workers": (200, PAGE),
    "GET /v1/models/tiny": (200, {"id": "tiny", "sampling": None}),
    "POST /v1/keys": (201, KEY),
    "GET /v1/keys": (200, {**PAGE, "data": [KEY]}),
    "POST /v1/login-links": (201, {"path": "/login?code=x", "expires_at": "2026-01-01T00:00:00Z"}),
    "POST /v1/gc": (200, {"checkpoints": [], "artifacts": [], "jobs": []}),
    "POST /v1/artifacts/art_1/links": (201, {"url": "/v1/downloads/x", "expires_at": "2026-01-01T00:00:00Z"}),
    "GET /v1/webhook-deliveries": (200, {**PAGE, "data": [DELIVERY]}),
    "GET /v1/jobs/job_1/webhook-deliveries": (200, {**PAGE, "data": [DELIVERY]}),
    "POST /v1/jobs/job_1/webhook-deliveries/msg_1/redeliver": (202, DELIVERY),
    "GET /v1/webhook-secret": (200, {"secret": "whsec_x"}),
    "GET /v1/tenants/team/limits": (200, {"tenant": "team", "limits": {"active_jobs": 0}, "usage": {}}),
    "GET /v1/audit": (
        200,
        {**PAGE, "data": [{"id": "1-1", "method": "POST", "path": "/v1/jobs", "status": 202}]},
    ),
    "DELETE /v1/keys/key_1": (204, None),
    "DELETE /v1/artifacts/art_1": (204, None),
    "POST /v1/chat/completions": (200, f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n"),
    "GET /v1/jobs/job_1/events": (200, f"id: 1-1\nevent: state\ndata: {json.dumps(EVENT)}\n\n"),
}
# Each command with what it needs to be given.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "submit": ("a/b",), "watch": ("job_1",), "jobs": (), "cancel": ("job_1",), "retry": ("job_1",),
    "events": ("job_1",), "report": ("job_1",), "export": ("job_1",), "estimate": ("a/b",), "workers": (),
    "datasets upload": ("FILE",), "datasets list": (), "datasets show": ("ds_1",),
    "datasets delete": ("ds_1", "--yes"),
    "login": (), "recommend": ("a/b", "--gpu", "h100"),
    "deploy": ("art_1", "--name", "tiny"), "chat": ("tiny", "hello"), "gc": ("--dry-run",),
    "push": ("art_1", "org/name"), "tag": ("art_1", "production"), "registry": (),
    "artifacts": (), "artifacts show": ("art_1",), "artifacts delete": ("art_1", "--yes"),
    "artifacts link": ("art_1", "config.json"), "logs": ("job_1",), "compare": ("job_1",), "open": (),
    "limits": ("team",), "audit": (), "webhooks list": ("job_1",), "webhooks repeat": ("job_1", "msg_1"),
    "webhooks secret": (),
    "artifacts download": ("art_1", "--out", "OUT"),
    "deployments": (), "deployments show": ("tiny",), "deployments delete": ("tiny", "--yes"),
    "deployments pause": ("tiny",), "deployments resume": ("tiny",), "deployments alias": ("tiny", "b"),
    "deployments scale": ("tiny", "2", "--no-wait"), "deployments replace": ("tiny", "art_1"),
    "keys create": ("--scopes", "jobs:read"), "keys list": (), "keys revoke": ("key_1", "--yes"),
}  # fmt: skip
# Those that run something here have tests of their own.
WITHOUT_SERVICE = {"up", "api", "worker", "quantize", "doctor", "discover", "help"}


Command = TyperCommand | TyperGroup


def commands(group: TyperGroup, path: str = "") -> Iterator[tuple[str, Command]]:
    """Every command that does something; of groups those that do so without a subcommand."""
    for name, command in group.commands.items():
        where = f"{path} {name}".strip()
        assert isinstance(command, Command)
        if not isinstance(command, TyperGroup) or command.invoke_without_command:
            yield where, command
        if isinstance(command, TyperGroup):
            yield from commands(command, where)


def every_command() -> dict[str, Command]:
    root = typer.main.get_command(build())
    assert isinstance(root, TyperGroup)
    return dict(commands(root))


def with_groups(group: TyperGroup, path: str = "") -> Iterator[str]:
    """The words of every command and of every group; of the root none."""
    yield path
    for name, command in group.commands.items():
        where = f"{path} {name}".strip()
        if isinstance(command, TyperGroup):
            yield from with_groups(command, where)
        else:
            yield where


def every_page() -> list[str]:
    root = typer.main.get_command(build())
    assert isinstance(root, TyperGroup)
    return list(with_groups(root))


def test_every_command_prints_json_on_request() -> None:
    missing = [
        name for name, command in every_command().items()
        if not any("--json" in option.opts for option in command.params)
    ]  # fmt: skip
    assert missing == []
    assert every_command().keys() == ARGUMENTS.keys() | WITHOUT_SERVICE


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert re.fullmatch(r"nibble \d+\.\d+.*\n", capsys.readouterr().out)


def test_every_command_and_option_is_explained() -> None:
    for name, command in every_command().items():
        assert command.help, name
        for option in command.params:
            if isinstance(option, TyperOption):
                assert option.help, f"{name} {option.opts}"


FILES_OF_EXAMPLES = ("train.jsonl", "chats.jsonl.gz")  # commands look for them while they read their words


def help_of(words: str, capsys: pytest.CaptureFixture[str], option: str = "--help") -> str:
    assert run(*words.split(), option) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", every_page())
def test_help_fits_80_columns_and_cuts_nothing(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = help_of(words, capsys)
    assert max(map(len, page.splitlines())) <= 80
    command: Any = typer.main.get_command(build())
    for word in words.split():
        command = command.commands[word]
    typed = re.split(r"[\s,]+", page)
    for option in command.params:
        names = [*option.opts, *option.secondary_opts] if isinstance(option, TyperOption) else []
        assert set(names) <= set(typed)
        assert set((option.help or "").split()) <= set(page.split()), f"the help of {option.name} is cut"
    assert not re.search(r"<\w+>|<list|\brange\b", page)  # types of Python are noise
    assert page == help_of(words, capsys, "-h")
    assert run("help", *words.split()) == 0
    assert capsys.readouterr().out == page


@pytest.mark.parametrize("words", every_page())
def test_each_help_ends_with_examples_that_can_be_typed(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in FILES_OF_EXAMPLES:
        (tmp_path / file).touch()
    page = help_of(words, capsys)
    assert EXAMPLES[words], words
    assert all(f"  {line}\n" in page for line in EXAMPLES[words])
    for line in EXAMPLES[words]:
        settings = {"help_option_names": ["-h", "--help"]}
        typed = shlex.split(re.sub(r"^\S+=\S+ |\s*>.*", "", line))
        assert typed[0] == "nibble"
        command: Any = typer.main.get_command(build())
        context = command.make_context("nibble", [], resilient_parsing=True)
        rest = typed[1:]
        while isinstance(command, TyperGroup) and rest and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        context = type(context)(command, info_name="nibble", parent=context, **settings)
        command.parse_args(context, list(rest))


def test_summaries_of_commands_are_those_of_their_own_help() -> None:
    """`nibble --help` imports no command, so each has its summary twice: they must not contradict."""
    assert EXAMPLES.keys() == set(every_page())
    for name, entry in ENTRIES.items():
        module, _, attribute = entry.where.partition(":")
        assert hasattr(importlib.import_module(f"app.commands.{module}"), attribute), name
        assert len(entry.summary) <= 65
        assert entry.summary.endswith(".")


@pytest.fixture
def service() -> Iterator[Canned]:
    with canned_service(dict(ANSWERS)) as canned:
        yield canned


@pytest.mark.parametrize("command", ARGUMENTS)
def test_json_is_all_that_a_command_prints(
    command: str, service: Canned, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "train.jsonl"
    text.touch()
    given = [{"OUT": str(tmp_path), "FILE": str(text)}.get(word, word) for word in ARGUMENTS[command]]
    if command == "events":
        service.then["GET /v1/jobs/job_1/events"] = (204, None)
    if command == "logs":
        service.answers["GET /v1/jobs/job_1/events"] = (200, {**PAGE, "data": [EVENT]})
    if command == "deployments delete":
        service.answers["DELETE /v1/deployments/dep_1"] = (204, None)
        del service.answers["GET /v1/deployments/dep_1"]
    assert run(*command.split(), *given, "--json", "--url", service.url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    documents: list[Any] = [json.loads(line) for line in lines]
    assert all(isinstance(document, dict) for document in documents)


def test_json_errors_go_to_stderr(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "job_9", "--json", "--url", service.url) == 1
    assert run("jobs", "--json", "--url", "http://127.0.0.1:9") == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    refused, unreachable = [json.loads(line)["error"] for line in captured.err.splitlines()]
    assert (refused["code"], refused["remedy"]) == ("not_found", "look again")
    assert unreachable["code"] == "service_unreachable"


def in_terminal(*arguments: str, **environment: str) -> str:
    """What a command writes to a terminal."""
    parent, child = pty.openpty()
    environment = {**plain_environment(), "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    command = [sys.executable, "-m", "app.cli", *arguments]
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment) as process:
        os.close(child)
        written = b""
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # the terminal's last writer has gone
                break
            if not piece:
                break
            written += piece
        process.wait(60)
    os.close(parent)
    return written.decode()


def plain_environment() -> dict[str, str]:
    """Without what forces or forbids colour on whoever runs the tests."""
    settled = (
        "NO_COLOR",
        "FORCE_COLOR",
        "CLICOLOR",
        "PY_COLORS",
        "GITHUB_ACTIONS",
        "CI",
        "TTY_",
        "COLORTERM",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(settled)}


COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|9[0-7])[0-9;]*m")


def test_colour_is_for_terminals(service: Canned) -> None:
    listing = ("jobs", "--url", service.url)
    assert COLOUR.search(in_terminal(*listing))
    without = in_terminal(*listing, NO_COLOR="1")
    assert "succeeded" in without
    assert not COLOUR.search(without)
    command = [sys.executable, "-m", "app.cli", *listing]
    piped = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, check=True)
    assert "succeeded" in piped.stdout
    assert "\x1b" not in piped.stdout + piped.stderr


def test_help_and_errors_have_no_colour_in_a_pipe() -> None:
    for arguments, code in (
        (("--help",), 0),
        (("nonsense",), 2),
        (("jobs", "--url", "http://127.0.0.1:9"), 3),
    ):
        command = [sys.executable, "-m", "app.cli", *arguments]
        ended = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, check=False)
        assert ended.returncode == code
        assert "\x1b" not in ended.stdout + ended.stderr


def hear_interrupts() -> None:
    """Programs in the background of a script are started with SIGINT ignored, and so are their tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_with_130(service: Canned) -> None:
    service.answers["GET /v1/jobs/job_1"] = (200, {**JOB, "state": "running"})
    command = [sys.executable, "-m", "app.cli", "watch", "job_1", "--json", "--url", service.url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=hear_interrupts) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["state"] == "running"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Path:
    """A `nibble` on PATH that runs this tree."""
    program = tmp_path / "bin" / "nibble"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{repository}" exec "{sys.executable}" -m app.cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("nibble arti", ["artifacts"]), ("nibble artifacts do", ["download"]),
     ("nibble submit m --format c", ["compressed-tensors"]), ("nibble jobs --sta", ["--state"])],
)  # fmt: skip
def test_bash_completes(typed: str, offered: list[str], on_path: Path) -> None:
    words = " ".join(f"'{word}'" for word in typed.split())
    script = f"""
        eval "$(nibble --show-completion)"
        COMP_WORDS=({words}); COMP_CWORD={len(typed.split()) - 1}
        $(complete -p nibble | sed 's/.*-F \\([^ ]*\\).*/\\1/') nibble
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    command = ["bash", "--norc", "--noprofile", "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.stdout.split() == offered, ended.stderr
