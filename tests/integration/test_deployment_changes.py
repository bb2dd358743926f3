"""Deployments that change while they serve: real workers, stand-in servers, and requests all the time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.access.api_keys import Scope
from app.core.storage.artifact_store import ArtifactStore
from tests.integration.api_service import ADMIN_KEY, Service
from tests.integration.serving_floor import Floor
from tests.waiting import wait_until

STREAMS = 8


@pytest.fixture
def floor(service: Service) -> Floor:
    return Floor(service)


class Load:
    """Streams that follow each other, some at a time. Each that ends badly is noted."""

    def __init__(self, floor: Floor, name: str, **fields: object) -> None:
        self._floor, self._body = floor, {"model": name, "stream": True, **fields}
        self._ended = threading.Event()
        self.texts: list[str] = []
        self.failures: list[str] = []

    def run(self) -> None:
        service = self._floor.service
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
            while not self._ended.is_set():
                self._ask(client)

    def _ask(self, client: httpx.Client) -> None:
        try:
            with client.stream("POST", "/v1/chat/completions", json=self._body) as answer:
                lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        except httpx.HTTPError as fault:
            self.failures.append(repr(fault))
            return
        if answer.status_code != 200 or lines[-1] != "[DONE]" or any('"error"' in line for line in lines):
            self.failures.append(f"{answer.status_code} {lines[-2:]}")
            return
        deltas = [json.loads(line)["choices"] for line in lines[:-1]]
        self.texts.append("".join(choice["delta"].get("content") or "" for each in deltas for choice in each))

    def stop(self) -> None:
        self._ended.set()


@contextmanager
def load(floor: Floor, name: str, **fields: object) -> Iterator[Load]:
    """STREAMS streams at a time while the block runs; each ends by itself before this does."""
    running = Load(floor, name, **fields)
    with ThreadPoolExecutor(STREAMS) as pool:
        asking = [pool.submit(running.run) for _ in range(STREAMS)]
        try:
            wait_until(lambda: running.failures or len(running.texts) >= STREAMS, 60)
            yield running
        finally:
            running.stop()
    for each in asking:
        each.result()


def patch(floor: Floor, deployment_id: str, etag: str | None = None, **fields: object) -> httpx.Response:
    headers = {} if etag is None else {"If-Match": etag}
    return floor.client.patch(f"/v1/deployments/{deployment_id}", json=fields, headers=headers)


def generations(floor: Floor, deployment_id: str) -> list[int]:
    """Of the servers that are ready."""
    servers = floor.view(deployment_id)["servers"]
    return sorted(server["generation"] for server in servers if server["state"] == "ready")


def replaced(floor: Floor, deployment_id: str, generation: int, replicas: int) -> bool:
    view = floor.view(deployment_id)
    return (
        (view["generation"], view["replacement"]) == (generation, None)
        and len(view["servers"]) == replicas
        and generations(floor, deployment_id) == [generation] * replicas
    )


def test_a_replacement_under_load_fails_no_request(floor: Floor) -> None:
    old, new = floor.artifact(), floor.artifact(prefix="new ", load_s=1)
    with floor.worker(NIBBLE_SERVE_SLOTS="8"):
        deployment_id = floor.ready("tiny", artifact=old, replicas=2)
        ready: list[int] = []
        with load(floor, "tiny", tokens=20, pause=0.05) as streams:
            before = len(streams.texts)
            view = patch(floor, deployment_id, artifact=new).json()
            assert (view["artifact"], view["replacement"]["served"]["artifact"]) == (old, new)
            assert (view["generation"], view["replacement"]["generation"]) == (1, 2)
            assert "is under way: 0 of 2 servers ready" in view["reason"]

            def is_replaced() -> bool:
                ready.append(len(generations(floor, deployment_id)))
                return replaced(floor, deployment_id, 2, 2)

            wait_until(is_replaced, 60)
            end = len(streams.texts)
            wait_until(lambda: len(streams.texts) >= end + 2 * STREAMS, 60)
        assert streams.failures == []
        assert min(ready) >= 2
        text = "".join(f"t{index} " for index in range(20))
        assert set(streams.texts[:before]) == {text}
        assert set(streams.texts[-STREAMS:]) == {f"new {text}"}
        after = floor.view(deployment_id)
        assert (after["artifact"], after["reason"], after["revision"]) == (new, "", 2)
        floor.client.delete(f"/v1/artifacts/{old}").raise_for_status()  # nothing serves it any more


def test_a_worker_killed_amid_a_replacement_is_made_up_for(floor: Floor, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    new = floor.artifact(prefix="new ", load_gate=str(gate))
    with floor.worker("one") as first, floor.worker("two"):
        deployment_id = floor.ready("tiny", replicas=2)
        patch(floor, deployment_id, artifact=new).raise_for_status()
        wait_until(lambda: any(each["generation"] == 2 for each in floor.view(deployment_id)["servers"]), 30)
        first.kill()
        first.wait()
        gate.touch()
        wait_until(lambda: replaced(floor, deployment_id, 2, 2), 60)
        servers = floor.view(deployment_id)["servers"]
        assert {server["worker"] for server in servers} == {"two"}
        answers = [floor.chat("tiny") for _ in range(4)]
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert texts == {"new t0 t1 t2 "}


def test_a_replacement_that_can_not_start_leaves_the_old_one(floor: Floor) -> None:
    cause = {"code": "kernel_missing", "message": "no kernel for 3 bits", "remedy": "use 4 bits"}
    old, bad = floor.artifact(), floor.artifact(fail=cause)
    with floor.worker():
        deployment_id = floor.ready("tiny", artifact=old)
        pids = floor.server_pids(deployment_id)
        patch(floor, deployment_id, artifact=bad).raise_for_status()
        wait_until(lambda: floor.view(deployment_id)["replacement"]["error"], 30)
        view = floor.view(deployment_id)
        assert (view["state"], view["artifact"], view["error"]) == ("ready", old, None)
        assert view["replacement"]["error"] == cause
        assert "no kernel for 3 bits; what served before goes on" in view["reason"]
        assert floor.chat("tiny").status_code == 200
        assert floor.server_pids(deployment_id) == pids
        # The next try is a generation of its own; to go back to what serves forgets the failure.
        good = patch(floor, deployment_id, artifact=floor.artifact(prefix="new ")).json()
        assert good["replacement"]["generation"] == 3
        assert patch(floor, deployment_id, artifact=old).json()["replacement"] is None
        wait_until(lambda: len(floor.view(deployment_id)["servers"]) == 1, 30)
        assert floor.server_pids(deployment_id) == pids


def test_scaled_up_and_down_under_load(floor: Floor) -> None:
    with floor.worker():
        deployment_id = floor.ready("tiny")
        with load(floor, "tiny", tokens=20, pause=0.05) as streams:
            assert patch(floor, deployment_id, replicas=2).json()["replicas"] == 2
            floor.await_servers(deployment_id, 2)
            wait_until(lambda: all(floor.running(deployment_id, slot) > 1 for slot in range(2)), 30)
            patch(floor, deployment_id, replicas=1).raise_for_status()
            wait_until(lambda: len(floor.view(deployment_id)["servers"]) == 1, 60)
            assert not floor.server_pids(deployment_id, 1)
        assert streams.failures == []
        assert floor.view(deployment_id)["generation"] == 1


def test_pause_and_resume(floor: Floor, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with floor.worker():
        deployment_id = floor.ready("tiny", aliases=["also"])
        with floor.stream("tiny", tokens=5, gate=str(gate)) as lines:
            next(lines)
            view = patch(floor, deployment_id, paused=True).json()
            assert (view["state"], view["reason"].split(" by")[0]) == ("paused", "paused")
            for name in ("tiny", "also"):
                refused = floor.chat(name)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "deployment_paused")
                assert "retry-after" not in refused.headers
            gate.touch()
            assert list(lines)[-1] == "data: [DONE]"  # what had begun is finished
        wait_until(lambda: not floor.view(deployment_id)["servers"], 30)
        assert floor.client.get("/v1/models").json()["data"] == []
        assert floor.chat("tiny").status_code == 503
        assert floor.view(deployment_id)["state"] == "paused"  # a request does not wake it
        # Its artifact is replaced at once, as nothing serves.
        view = patch(floor, deployment_id, artifact=floor.artifact(prefix="new ")).json()
        assert (view["state"], view["generation"], view["replacement"]) == ("paused", 2, None)
        patch(floor, deployment_id, paused=False).raise_for_status()
        floor.await_state(deployment_id, "ready")
        wait_until(lambda: floor.chat("tiny").status_code == 200, 30)
        assert floor.chat("also").json()["choices"][0]["message"]["content"].startswith("new ")


def test_aliases_are_names(floor: Floor) -> None:
    artifact = floor.artifact()
    with floor.worker():
        first = floor.ready("tiny", artifact=artifact, aliases=["gpt-x", "org/small"])
        assert floor.chat("gpt-x").json()["model"] == "tiny"
        with floor.stream("org/small") as lines:
            assert list(lines)[-1] == "data: [DONE]"
        data = floor.client.get("/v1/models").json()["data"]
        source = floor.client.get("/v1/models/tiny").json()["parent"]
        assert {card["id"]: card["parent"] for card in data} == {
            "tiny": source, "gpt-x": "tiny", "org/small": "tiny",
        }  # fmt: skip
        assert {card["root"] for card in data} == {artifact}
        card = floor.client.get("/v1/models/org/small").json()
        assert (card["id"], card["parent"], card["max_model_len"]) == ("org/small", "tiny", 512)
    # A name or alias is one deployment's, wherever it would come from.
    second = floor.deploy("other", artifact)
    taken = [
        floor.client.post("/v1/deployments", json={"artifact": artifact, "name": "gpt-x"}),
        floor.client.post("/v1/deployments", json={"artifact": artifact, "name": "n", "aliases": ["tiny"]}),
        floor.client.post("/v1/jobs", json={"model": "x", "deploy": {"name": "n", "aliases": ["org/small"]}}),
        patch(floor, second, aliases=["mine", "gpt-x"]),
    ]
    for answer in taken:
        assert (answer.status_code, answer.json()["code"]) == (409, "deployment_name_taken"), answer.text
    assert floor.view(second)["aliases"] == []
    # What is taken away is free, and so are all names of what is deleted.
    patch(floor, first, aliases=["org/small"]).raise_for_status()
    assert patch(floor, second, aliases=["gpt-x"]).json()["aliases"] == ["gpt-x"]
    floor.client.delete(f"/v1/deployments/{first}").raise_for_status()
    assert patch(floor, second, aliases=["gpt-x", "tiny", "org/small"]).status_code == 202


def test_of_two_changes_at_once_one_is_refused(floor: Floor) -> None:
    deployment_id = floor.deploy("tiny")
    route = f"/v1/deployments/{deployment_id}"
    etag = floor.client.get(route).headers["etag"]
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(patch, floor, deployment_id, etag, replicas=count) for count in (2, 3)]
        answers = {each.result().status_code: each.result() for each in asked}
    assert answers.keys() == {202, 412}
    assert answers[412].json()["code"] == "precondition_failed"
    done = answers[202]
    assert floor.view(deployment_id)["replicas"] == done.json()["replicas"]
    # The answer's tag is good for the next change; * for any.
    assert patch(floor, deployment_id, done.headers["etag"], replicas=4).status_code == 202
    assert patch(floor, deployment_id, "*", replicas=5).json()["revision"] == 4
    assert patch(floor, deployment_id, replicas=5).json()["revision"] == 4  # no change
    assert patch(floor, deployment_id, '"x"', replicas=6).status_code == 412
    now = {"If-None-Match": floor.client.get(route).headers["etag"]}
    assert floor.client.get(route, headers=now).status_code == 304
    details = [entry["detail"] for entry in floor.client.get("/v1/audit").json()["data"] if entry["detail"]]
    assert details[0] == 'tiny: {"replicas": 5}'


@pytest.mark.parametrize("change", [{}, {"original": None, "replicas": None}])
def test_a_change_of_nothing_is_refused(floor: Floor, change: dict[str, None]) -> None:
    deployment_id = floor.deploy("tiny")
    answer = patch(floor, deployment_id, **change)
    assert (answer.status_code, answer.json()["detail"]) == (
        422,
        "the body: give at least one field to change",
    )
    assert patch(floor, deployment_id, idle_timeout_s=None).status_code == 202  # null: never unloaded


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"replicas": 17}, 422, "validation_failed"),
        ({"name": "other"}, 422, "validation_failed"),
        ({"cache_share": 0.5}, 422, "validation_failed"),  # engine auto
        ({"cache_share": 1.5, "engine": "transformers"}, 422, "validation_failed"),
        ({"max_num_seqs": 4, "engine": "vllm", "vllm": {"max_num_seqs": 4}}, 422, "validation_failed"),
        ({"max_model_len": 4097, "engine": "transformers"}, 422, "max_model_len_too_large"),
        ({"max_model_len": 4097}, 422, "max_model_len_too_large"),  # engine auto
        ({"artifact": "art_01ARZ3NDEKTSV4RRFFQ69G5FAV"}, 404, "artifact_not_found"),
    ],
)
def test_what_can_not_be_is_refused(floor: Floor, fields: dict[str, Any], status: int, code: str) -> None:
    config = json.dumps({"model_type": "llama", "max_position_embeddings": 4096}).encode()
    job_id = floor.service.submit()["id"]
    artifact = floor.service.publish(job_id, {"stand_in.json": b"{}", "config.json": config}).id
    deployment_id = floor.deploy("tiny", artifact)
    before = floor.view(deployment_id)
    answers = [patch(floor, deployment_id, paused=True, **fields), patch(floor, deployment_id, **fields)]
    if "name" not in fields:
        whole = {"artifact": artifact, "name": "new", **fields}
        answers.append(floor.client.post("/v1/deployments", json=whole))
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert floor.view(deployment_id) == before
    assert patch(floor, deployment_id).status_code == 422  # nothing to change
    assert patch(floor, deployment_id, paused=True).status_code == 202
    refused = patch(floor, deployment_id, **fields)
    assert (refused.status_code, refused.json()["code"]) == (status, code)
    with floor.service.client_with(floor.service.key(Scope.DEPLOYMENTS_READ)) as reader:
        assert reader.patch(f"/v1/deployments/{deployment_id}", json={"replicas": 2}).status_code == 403


def test_options_reach_the_server_in_each_engines_words(floor: Floor) -> None:
    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4}
    with floor.worker():
        own = floor.ready("own", engine="transformers", cache_share=0.5, **options)
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in floor.server_pids(own)]
        flags = "--dtype float32 --max-model-len 128 --max-sequences 4 --cache-share 0.5"
        assert any(flags in line.replace(b"\0", b" ").decode() for line in lines)
        view = floor.view(own)
    assert {name: view[name] for name in options} == options
    assert (view["engine"], view["cache_share"]) == ("transformers", 0.5)


def test_an_artifact_that_replaces_another_is_in_use(floor: Floor) -> None:
    deployment_id = floor.deploy("tiny")
    new = floor.artifact()
    assert ArtifactStore(floor.service.objects).get("default", new).id == new
    patch(floor, deployment_id, artifact=new).raise_for_status()
    refused = floor.client.delete(f"/v1/artifacts/{new}")
    assert (refused.status_code, refused.json()["code"]) == (409, "artifact_in_use")
