"""What the guides tell people to write works: programs, commands, bodies."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from pydantic import BaseModel
from redis import Redis
from typer.core import TyperGroup
from typer.main import get_command

from app.cli import build
from app.core.deployments.deployment import DeploymentSpec
from app.core.jobs.recommendation import RecommendationRequest
from app.core.outgoing.webhook_messages import new_secret, signature
from app.core.records.job import JobState
from app.core.records.job_body import JobSubmission
from app.core.records.specs import Recipe
from app.core.redis.redis_programs import embedded_binary
from app.core.redis.redis_server import connect, wait_for_redis
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, MODEL, Service
from tests.waiting import wait_until

DOCS = Path(__file__).parents[2] / "docs"
WITH_BODIES = sorted(path for path in DOCS.glob("guides/*.md") if "```json\n" in path.read_text())
FENCE = re.compile(
    r"^(?P<mark><!-- executed -->\n)?(<!-- not executed: (?P<reason>[^\n]+) -->\n)?"
    r"```(?P<language>\w+)\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


def blocks(page: str, language: str, *, executed: bool) -> list[str]:
    found = FENCE.finditer((DOCS / page).read_text())
    return [each["text"] for each in found if each["language"] == language and bool(each["mark"]) is executed]


@contextmanager
def stand_in_worker(service: Service) -> Iterator[None]:
    """Ends each queued job with an artifact, as a worker does, without the work."""
    leaving = threading.Event()

    def work() -> None:
        while not leaving.wait(0.02):
            for job_id in service.store.in_state(JobState.QUEUED):
                manifest = service.publish(job_id, {"config.json": b"{}", "model.safetensors": b"x" * 5000})
                service.end(job_id, artifacts=(manifest.id,))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join()


def test_the_client_page(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    programs = blocks("guides/client.md", "python", executed=True)
    assert len(programs) == 6
    assert not blocks("guides/client.md", "python", executed=False)
    names = {"url": service.url, "key": ADMIN_KEY, "model": MODEL, "folder": tmp_path}
    with stand_in_worker(service):
        for program in programs:
            exec(compile(program, "client.md", "exec"), names)
    (downloaded,) = tmp_path.glob("art_*")
    assert (downloaded / "model.safetensors").read_bytes() == b"x" * 5000
    printed = capsys.readouterr().out
    assert "['succeeded', 'succeeded']" in printed
    assert "validation_failed" in printed
    assert "job_not_found" in printed


def typed(
    script: str, folder: Path, repository: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a reader types, with this tree's `nibble` on PATH."""
    program = folder / "bin" / "nibble"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH="${{TREE:-{repository}}}" exec "{sys.executable}" -m app.cli "$@"\n'
    )
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


def test_the_terminal_page(service: Service, tmp_path: Path, repository: Path) -> None:
    (script,) = blocks("guides/terminal.md", "sh", executed=True)
    given = {"NIBBLE_URL": service.url, "NIBBLE_API_KEY": ADMIN_KEY, "MODEL": MODEL}
    ended = typed(script, tmp_path, repository, **given)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "ended with 1" in ended.stdout
    assert json.loads((tmp_path / "jobs.json").read_text())["data"][0]["state"] == "queued"
    assert json.loads((tmp_path / "cancelled.json").read_text())["state"] == "cancelled"


def test_the_s3_page(s3_endpoint: str, tmp_path: Path, repository: Path) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="nibble")
    (script,) = blocks("guides/s3.md", "sh", executed=True)
    # Storage is what the page is about: PyTorch, which takes seconds to load, is not looked at here.
    (tmp_path / "torch.py").write_text("raise ImportError('not needed here')\n")
    ended = typed(script, tmp_path, repository, TREE=f"{tmp_path}:{repository}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "'status': 'ok'" in ended.stdout
    assert "s3://nibble/production" in ended.stdout


@pytest.mark.parametrize("page", sorted(DOCS.glob("guides/*.md")), ids=lambda page: page.name)
def test_lines_of_the_guides_are_executed_or_say_why_not(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others, commands and options are those that there are, and variables are settings."""
    for block in FENCE.finditer(page.read_text()):
        if block["language"] not in ("sh", "python") or block["mark"]:
            continue
        assert block["reason"], block["text"]
        for line in block["text"].replace("\\\n", " ").splitlines():
            check_words(shlex.split(line.partition(">")[0], comments=True), monkeypatch)
    Settings()


def check_words(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "export":
        name, _, value = words[1].partition("=")
        assert name.removeprefix("NIBBLE_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    elif words[0] == "nibble":
        command: Any = get_command(build())
        context, rest = command.context_class(command), words[1:]
        while isinstance(command, TyperGroup) and not rest[0].startswith("-"):
            _, command, rest = command.resolve_command(context, rest)
        # Parsed, not run; an option that would end the program by itself has to be there.
        parsed, _, _ = command.make_parser(context).parse_args(rest)
        assert parsed or "-" not in {word[0] for word in rest}


@pytest.mark.parametrize("page", WITH_BODIES, ids=lambda page: page.name)
def test_bodies_of_the_guides_are_accepted(page: Path) -> None:
    shapes: dict[str, type[BaseModel]] = {
        "gpu": RecommendationRequest,
        "artifact": DeploymentSpec,
        "model": JobSubmission,
        "method": Recipe,
    }
    names = {"…": "hf:org/name", "art_…": "art_01ARZ3NDEKTSV4RRFFQ69G5FAV"}
    for text in blocks(str(page.relative_to(DOCS)), "json", executed=False):
        for placeholder, name in names.items():
            text = text.replace(f'"{placeholder}"', f'"{name}"')
        body = json.loads(text)
        if "Version" in body:  # a policy of AWS
            assert {each["Effect"] for each in body["Statement"]} == {"Allow"}
            continue
        shape = next(shapes[field] for field in shapes if field in body)
        assert shape.model_validate(body)


def test_the_webhooks_page() -> None:
    (program,) = blocks("guides/webhooks.md", "python", executed=True)
    secret, body, now = new_secret(), '{"type":"job.succeeded"}', int(time.time())
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(now)}
    headers["webhook-signature"] = signature(secret, "msg_1", now, body)
    names = {"body": body, "headers": headers}
    exec(program.replace("whsec_…", secret), names)
    assert names["event"] == {"type": "job.succeeded"}
    headers["webhook-id"] = "msg_2"
    with pytest.raises(Exception, match="signature"):
        exec(program.replace("whsec_…", secret), names)


def test_a_backup_of_redis_is_restored_as_the_page_says(tmp_path: Path) -> None:
    """BGSAVE and `dump.rdb`; then once without the append-only file, which is switched on again."""
    page = (DOCS / "operations.md").read_text()
    assert "--appendonly no" in page
    assert "CONFIG SET appendonly yes" in page
    first, second = tmp_path / "first", tmp_path / "second"
    with server(first, "--appendonly", "yes") as redis:
        redis.set("nibble:job:1", "kept")
        redis.bgsave()
        wait_until(lambda: not redis.info("persistence")["rdb_bgsave_in_progress"])
    second.mkdir()
    (first / "dump.rdb").rename(second / "dump.rdb")
    with server(second, "--appendonly", "no") as redis:
        redis.config_set("appendonly", "yes")
        wait_until(lambda: not redis.info("persistence")["aof_rewrite_in_progress"])
    (second / "dump.rdb").unlink()
    with server(second, "--appendonly", "yes") as redis:
        assert redis.get("nibble:job:1") == b"kept"


@contextmanager
def server(folder: Path, *options: str) -> Iterator[Redis]:
    folder.mkdir(exist_ok=True)
    binary = embedded_binary()
    assert binary is not None
    command = [binary, "--port", "0", "--unixsocket", str(folder / "s"), "--save", "", "--dir", str(folder)]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as process:
        redis = connect(f"unix://{folder / 's'}")
        try:
            wait_for_redis(redis)
            yield redis
        finally:
            redis.close()
            process.terminate()
