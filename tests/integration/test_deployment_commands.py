"""The terminal's deployment commands against a running service with real workers and stand-in servers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pytest

from app.cli import main
from app.core.storage.artifact_store import ArtifactStore, file_key
from tests.integration.api_service import ADMIN_KEY, Service
from tests.integration.serving_floor import Floor
from tests.waiting import wait_until


@pytest.fixture
def floor(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Floor]:
    monkeypatch.setenv("NIBBLE_URL", service.url)
    monkeypatch.setenv("NIBBLE_API_KEY", ADMIN_KEY)
    floor = Floor(service)
    with floor.worker():
        yield floor


def nibble(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int | None)
    return int(ended.value.code or 0)


def test_deploy_chat_and_delete(
    floor: Floor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = floor.artifact(load_s=0.5)
    assert nibble("deploy", artifact, "--name", "tiny") == 0
    assert "nibble chat tiny" in capsys.readouterr().out
    wait_until(lambda: floor.chat("tiny").status_code == 200)
    assert nibble("deployments", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["state"] == "ready"
    assert nibble("deployments") == 0
    assert nibble("deployments", "show", "tiny") == 0
    listed = capsys.readouterr().out
    assert "1 of 1" in listed
    assert artifact in listed

    assert nibble("chat", "tiny", "hello") == 0
    assert capsys.readouterr().out == "t0 t1 t2 \n"
    monkeypatch.setattr(
        sys, "stdin", Terminal("hello\n/set temperature 0.5\n/nonsense\n/undo\n/new\n/quit\n")
    )
    assert nibble("chat", "tiny") == 0
    spoken = capsys.readouterr().out
    assert "t0 t1 t2" in spoken
    assert "temperature 0.7, top_p 0.95 (Nibble's default: the model sets none)" in spoken
    assert "temperature is 0.5" in spoken
    assert "no messages left" in spoken

    assert nibble("deployments", "delete", "tiny", "--yes") == 0
    assert nibble("chat", "tiny", "hello") == 1
    assert nibble("deployments", "delete", "tiny") == 1
    assert "deployment_not_found" in capsys.readouterr().err


def test_a_chat_is_sampled_as_its_model_asks_unless_its_user_says_otherwise(
    floor: Floor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = floor.artifact()
    floor.deploy("tiny", artifact)
    manifest = ArtifactStore(floor.service.objects).get("default", artifact)
    settings = {"temperature": 0.6, "top_k": 20, "do_sample": True}
    floor.service.objects.put(file_key(manifest, "generation_config.json"), json.dumps(settings).encode())
    wait_until(lambda: floor.chat("tiny").status_code == 200)
    assert nibble("chat", "tiny", "hello", "--json", "--top-p", "0.9", "--temperature", "0") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"] == {"temperature": 0.0, "top_k": 20, "top_p": 0.9}
    monkeypatch.setattr(sys, "stdin", Terminal("/quit\n"))
    assert nibble("chat", "tiny", "--seed", "3") == 0
    assert "temperature 0.6, top_k 20 (the model's own); seed 3 (yours)" in capsys.readouterr().out


class Terminal(io.StringIO):
    """Lines that somebody types."""

    def isatty(self) -> bool:
        return True


def test_chat_waits_for_a_model_that_loads(floor: Floor, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = floor.artifact(load_s=1)
    floor.deploy("tiny", artifact)
    assert nibble("chat", "tiny", "hello") == 0
    assert capsys.readouterr().out == "t0 t1 t2 \n"


def test_deploy_tells_why_nothing_can_be_served(floor: Floor, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"code": "kernel_missing", "message": "no kernel for 3 bits", "remedy": "use 4 bits"}
    assert nibble("deploy", floor.artifact(fail=told), "--name", "tiny") == 1
    errors = capsys.readouterr().err
    assert "no kernel for 3 bits" in errors
    assert "use 4 bits" in errors


def test_a_deployment_is_changed_while_it_serves(floor: Floor, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = floor.artifact(), floor.artifact(prefix="new ")
    assert nibble("deploy", old, "--name", "tiny", "--alias", "small", "--max-num-seqs", "4") == 0
    assert "aliases: small" in capsys.readouterr().out
    assert nibble("deployments", "scale", "tiny", "2", "--json") == 0
    scaled = json.loads(capsys.readouterr().out)
    assert [server["state"] for server in scaled["servers"]] == ["ready", "ready"]
    assert nibble("deployments", "scale", "small", "1") == 0  # an alias is a name here, too
    assert nibble("deployments", "alias", "tiny", "other") == 0
    assert nibble("deployments", "alias", "tiny", "small", "--remove") == 0
    assert "aliases: other" in capsys.readouterr().out
    assert nibble("deployments", "alias", "tiny", "small", "other", "--remove") == 1  # it has that no more
    refusal = capsys.readouterr().err
    assert "tiny has no alias small" in refusal
    assert "remove one of: other" in refusal
    assert nibble("deployments", "alias", "tiny", "--remove", "nobodys") == 1
    assert nibble("tag", old, "--remove", "production") == 1
    assert f"{old} has no tag production" in capsys.readouterr().err
    assert nibble("deployments", "replace", "other", new) == 0
    assert new in capsys.readouterr().out

    def answer() -> str:
        assert nibble("chat", "other", "hello") == 0
        return capsys.readouterr().out

    wait_until(lambda: answer() == "new t0 t1 t2 \n")  # the routing of requests follows the record

    assert nibble("deployments", "pause", "tiny") == 0
    assert "paused by its owner" in capsys.readouterr().out
    assert nibble("chat", "tiny", "hello") == 1
    assert "deployment_paused" in capsys.readouterr().err
    assert nibble("deployments", "resume", "tiny") == 0
    wait_until(lambda: floor.chat("tiny").status_code == 200)

    cause = {"code": "kernel_missing", "message": "no kernel for 3 bits", "remedy": "use 4 bits"}
    assert nibble("deployments", "replace", "tiny", floor.artifact(fail=cause)) == 1
    errors = capsys.readouterr().err
    assert "no kernel for 3 bits" in errors
    assert "use 4 bits" in errors
    assert floor.chat("tiny").status_code == 200
