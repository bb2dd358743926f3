from __future__ import annotations

from collections.abc import Iterator

import pytest

from app.commands.short_ids import whole_id
from app.core.errors import InvalidRequest, NotFound
from tests.unit.app.canned import Canned, canned_service, run

NEWEST, OLDER, OLDEST = (
    f"job_01M8ER{rest}" for rest in ("G05NKHQNMYVT6W2XZABC", "G9AAAAAAAAAAAAAAAAAA", "A000000000")
)
IDS = [f"{one:0<30}" for one in (NEWEST, OLDER, OLDEST)]


def resolved(written: str) -> str:
    return whole_id(written, "job", lambda: iter(IDS))


@pytest.mark.parametrize("written", ["last", IDS[0], IDS[0][:14], IDS[0][4:14], IDS[0][:14].lower()])
def test_one_id_is_meant(written: str) -> None:
    assert resolved(written) == IDS[0]


def test_a_whole_id_is_not_looked_for() -> None:
    def refuse() -> Iterator[str]:
        raise AssertionError

    whole = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
    assert whole_id(whole, "job", refuse) == whole


def test_what_several_ids_begin_with_lists_them() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolved("job_01M8ERG")
    assert refused.value.code == "id_ambiguous"
    assert IDS[0] in refused.value.message
    assert IDS[1] in refused.value.message
    assert IDS[2] not in refused.value.message


def test_what_no_id_begins_with_is_for_the_service_to_refuse() -> None:
    assert resolved("job_9") == "job_9"
    assert resolved("") == ""
    with pytest.raises(NotFound, match="no job yet"):
        whole_id("last", "job", lambda: iter(()))


def job(whole: str, **changes: object) -> dict[str, object]:
    spec = {"model": "file:///home/someone/models/wikitext-llama-6m", "recipe": {"bits": 4, "group_size": 64}}
    return {
        "id": whole, "state": "succeeded", "created_at": "2026-01-01T00:00:00Z", "spec": spec,
        "progress": {"fraction": 1.0}, "artifacts": ["art_" + whole[4:]], **changes,
    }  # fmt: skip


def artifact(whole: str) -> dict[str, object]:
    return {
        "id": whole, "job": IDS[0], "created_at": "2026-01-01T00:00:00Z", "format": "compressed-tensors",
        "model": "file:///home/someone/models/wikitext-llama-6m", "recipe": {"bits": 4, "group_size": 64},
        "tags": ["production", "candidate"], "files": [{"path": "a", "size": 4_600_000, "sha256": "ab" * 32}],
    }  # fmt: skip


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Canned]:
    monkeypatch.setenv("COLUMNS", "80")
    artifacts = [f"art_{one[4:]}" for one in IDS]
    key = {"tenant": "research", "name": "notebook of the team", "scopes": ["jobs:read", "jobs:write"]}
    deployment = {"name": "assistant-of-the-team", "engine": "transformers",
                  "state": "ready", "created_at": "2026-01-01T00:00:00Z"}  # fmt: skip
    answers: dict[str, tuple[int, object]] = {
        "GET /v1/jobs": (200, {"data": [job(one) for one in IDS]}),
        "GET /v1/artifacts": (200, {"data": [artifact(one) for one in artifacts]}),
        "GET /v1/registry": (200, {"data": [{"model": "a", "versions": list(map(artifact, artifacts))}]}),
        "GET /v1/deployments": (200, {"data": [
            {"id": f"dep_{one[4:]}", "artifact": f"art_{one[4:]}", **deployment} for one in IDS
        ]}),
        "GET /v1/keys": (200, {"data": [
            {"id": f"key_{one[4:]}", "created_at": "2026-01-01T00:00:00Z", **key} for one in IDS
        ]}),
        f"GET /v1/jobs/{IDS[0]}/webhook-deliveries": (200, {"data": [
            {"id": f"msg_{one[4:]}", "job": IDS[0], "type": "job.succeeded", "url": "https://a.example/b",
             "state": "delivered", "created_at": "2026-01-01T00:00:00Z", "tries": [{"status": 200}]}
            for one in IDS
        ]}),
        f"GET /v1/jobs/{IDS[0]}": (200, job(IDS[0])),
        f"GET /v1/jobs/{IDS[0]}/report": (200, {"model": "a/b", "stages": {}}),
        f"POST /v1/jobs/{IDS[0]}/cancel": (202, job(IDS[0], state="cancelling")),
        f"DELETE /v1/artifacts/{artifacts[0]}": (204, None),
    }  # fmt: skip
    with canned_service(answers) as canned:
        yield canned


@pytest.mark.parametrize(
    ("command", "kind"),
    [(("jobs",), "job"), (("artifacts",), "art"), (("registry",), "art"), (("keys", "list"), "key"),
     (("deployments",), "art"), (("webhooks", "list", "last"), "msg")],
)  # fmt: skip
def test_no_table_cuts_an_id_at_80_columns(
    command: tuple[str, ...], kind: str, service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, "--url", service.url) == 0
    out = capsys.readouterr().out
    assert all(f"{kind}_{one[4:]}" in out.split() for one in IDS)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


@pytest.mark.parametrize("written", ["last", IDS[0][:13]])
def test_commands_take_short_ids(written: str, service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", written, "--json", "--url", service.url) == 0
    assert run("cancel", written, "--url", service.url) == 0
    assert run("artifacts", "delete", written.replace("job_", "art_"), "--yes", "--url", service.url) == 0
    assert f"art_{IDS[0][4:]} is deleted" in capsys.readouterr().out


def test_nothing_is_deleted_unasked(service: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ("artifacts", "delete", "last"),
        ("keys", "revoke", "last"),
        ("webhooks", "secret", "--rotate"),
    ):
        assert run(*command, "--url", service.url) == 1
        assert "add --yes" in capsys.readouterr().err
    assert not any(route.startswith(("DELETE", "POST")) for route, _, _ in service.requests)
