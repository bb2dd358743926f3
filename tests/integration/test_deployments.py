"""Deployments from creation to removal, with real workers and server processes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from app.core.access.api_keys import Scope
from app.core.records.serving_options import MOST_IDLE_S
from tests.integration.api_service import ADMIN_KEY, Service
from tests.integration.serving_floor import Floor
from tests.waiting import wait_until


@pytest.fixture
def floor(service: Service) -> Floor:
    return Floor(service)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that servers wait for."""
    return tmp_path / "gate"


@pytest.fixture
def worker(floor: Floor) -> Iterator[None]:
    with floor.worker():
        yield


def content(lines: Iterator[str]) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    return "".join(event["choices"][0]["delta"]["content"] for event in events)


@pytest.mark.usefixtures("worker")
def test_a_deployment_from_creation_to_removal(floor: Floor) -> None:
    artifact = floor.artifact()
    deployment_id = floor.deploy("tiny", artifact, idle_timeout_s=600)
    view = floor.await_state(deployment_id, "ready")
    assert (view["reason"], view["error"], view["engine"]) == ("", None, "auto")
    assert view["servers"][0]["engine"] == "transformers"
    wait_until(lambda: floor.chat("tiny").status_code == 200)
    assert floor.chat("tiny").json()["choices"][0]["message"]["content"] == "t0 t1 t2 "
    with floor.stream("tiny", tokens=4) as lines:
        assert content(lines) == "t0 t1 t2 t3 "
    card = floor.client.get("/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["max_model_len"]) for model in card] == [
        ("tiny", artifact, 512)
    ]
    assert floor.client.get("/v1/models/tiny").json()["id"] == "tiny"
    workers = floor.client.get("/v1/workers").json()["data"]
    assert [(worker["queue"], worker["servers"]) for worker in workers] == [("serve", 1)]
    metrics = floor.client.get("/metrics").text
    assert 'nibble_deployments{state="ready"} 1.0' in metrics
    assert f'nibble_inference_requests_total{{deployment="{deployment_id}",status="200"}}' in metrics

    route = f"/v1/deployments/{deployment_id}/servers"
    assert "vllm:num_requests_running" in floor.client.get(f"{route}/0/metrics").text
    assert floor.client.get(f"{route}/1/metrics").json()["code"] == "server_not_found"
    (target,) = floor.client.get("/v1/scrape-targets").json()
    assert target["targets"] == [floor.client.base_url.netloc.decode()]
    assert (target["labels"]["deployment"], target["labels"]["server"]) == ("tiny", "0")
    scraped = floor.client.get(target["labels"]["__metrics_path__"])
    assert scraped.headers["content-type"].startswith("text/plain")
    assert "vllm:num_requests_running" in scraped.text
    with floor.service.client_with(floor.service.key(Scope.DEPLOYMENTS_READ, tenant="another")) as stranger:
        assert stranger.get("/v1/scrape-targets").json() == []

    in_use = floor.client.delete(f"/v1/artifacts/{artifact}")
    assert (in_use.status_code, in_use.json()["code"]) == (409, "artifact_in_use")
    assert floor.client.delete(f"/v1/deployments/{deployment_id}").status_code == 202
    assert floor.chat("tiny").status_code == 404
    wait_until(lambda: floor.client.get(f"/v1/deployments/{deployment_id}").status_code == 404)
    assert not floor.server_pids(deployment_id)
    cached = floor.service.settings.state_dir / "cache" / "artifacts" / artifact
    wait_until(lambda: not cached.exists())
    assert floor.client.delete(f"/v1/artifacts/{artifact}").status_code == 204


@pytest.mark.usefixtures("worker")
def test_what_a_server_answers_below_v1_is_passed_on(floor: Floor) -> None:
    """By rule, not by a list: also routes that vLLM will have. What is the service's own stays its own."""
    floor.ready("org/tiny")
    post, body = floor.client.post, {"model": "org/tiny", "x": 1}
    for path in (
        "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v1/rerank",
        "/v1/audio/speech", "/v1/chat/completions/render", "/tokenize", "/detokenize",
    ):  # fmt: skip
        answer = post(path, json=body, headers={"anthropic-version": "2023-06-01"}).json()
        expected = {"anthropic-version": "2023-06-01", "authorization": None}
        assert (answer["path"], answer["body"], answer["headers"]) == (path, body, expected)
    for path in ("/v1/rerank", "/v1/files"):
        unknown = post(path, content=b"no JSON")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    assert post("/v1/jobs/x/nothing", json=body).headers["content-type"] == "application/problem+json"
    assert floor.client.patch("/v1/jobs").headers["allow"] == "GET, HEAD, POST"
    anthropic = post("/v1/messages", json={"model": "absent"}).json()
    assert (anthropic["type"], anthropic["error"]["type"]) == ("error", "not_found_error")
    card = floor.client.get("/v1/models/org/tiny").json()
    assert card["id"] == "org/tiny"
    assert card["parent"].startswith("file://")
    assert card["quantization"] == {**card["quantization"], "format": "awq", "bits": 4}
    assert {floor.client.get(path).status_code for path in ("/health", "/ping", "/version")} == {200}


@pytest.mark.usefixtures("worker")
def test_chunks_pass_as_they_come(floor: Floor, gate: Path) -> None:
    floor.ready("tiny")
    with floor.stream("tiny", gate=str(gate)) as lines:
        first = next(lines)
        # The server holds everything else back until the gate opens: what came was not waited for.
        gate.touch()
        assert content(iter([first, *lines])) == "t0 t1 t2 "


@pytest.mark.usefixtures("worker")
def test_delete_lets_a_running_stream_end(floor: Floor, gate: Path) -> None:
    deployment_id = floor.ready("tiny")
    with floor.stream("tiny", tokens=8, gate=str(gate)) as lines:
        first = next(lines)
        assert floor.client.delete(f"/v1/deployments/{deployment_id}").json()["state"] == "draining"
        assert floor.chat("tiny").status_code == 404
        # The name is free at once.
        assert floor.view(floor.deploy("tiny"))["state"] in ("starting", "ready")
        wait_until(lambda: floor.view(deployment_id)["servers"][0]["state"] == "draining")
        gate.touch()
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert content(iter([first, *rest])) == "".join(f"t{index} " for index in range(8))
    wait_until(lambda: floor.client.get(f"/v1/deployments/{deployment_id}").status_code == 404)


@pytest.mark.usefixtures("worker")
def test_an_idle_deployment_rests_until_the_next_request(floor: Floor) -> None:
    deployment_id = floor.ready("tiny", idle_timeout_s=1)
    view = floor.await_state(deployment_id, "stopped")
    assert view["servers"] == []
    assert "next one starts it again" in view["reason"]
    assert not floor.server_pids(deployment_id)
    assert [model["id"] for model in floor.client.get("/v1/models").json()["data"]] == ["tiny"]
    refused = floor.chat("tiny")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
    assert int(refused.headers["retry-after"]) >= 1
    wait_until(lambda: floor.chat("tiny").status_code == 200)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("before", [600, None])
def test_a_changed_idle_time_counts_from_the_last_request(floor: Floor, before: int | None) -> None:
    """A shorter one is over at once, a longer one is not; both without another request."""
    deployment_id = floor.ready("tiny", idle_timeout_s=before)
    used = f"nibble:deployment-used:{deployment_id}"
    wait_until(lambda: floor.service.redis.pttl(used) < (MOST_IDLE_S - 2) * 1000)
    route = f"/v1/deployments/{deployment_id}"
    floor.client.patch(route, json={"idle_timeout_s": 300}).raise_for_status()
    assert floor.deployments.was_used(floor.deployments.get("default", deployment_id).deployment)
    floor.client.patch(route, json={"idle_timeout_s": 1}).raise_for_status()
    assert not floor.deployments.was_used(floor.deployments.get("default", deployment_id).deployment)
    floor.await_state(deployment_id, "stopped")


@pytest.mark.usefixtures("worker")
def test_a_long_stream_keeps_its_deployment_awake(floor: Floor) -> None:
    deployment_id = floor.ready("tiny", idle_timeout_s=1)
    with floor.stream("tiny", tokens=40, pause=0.1) as lines:
        first = list(islice(lines, 30))  # three times as long as it may be idle
        state = floor.view(deployment_id)["state"]
        assert len([*first, *lines]) == 41
    assert state == "ready"


def test_more_replicas_than_slots_name_the_setting_that_gives_more(floor: Floor) -> None:
    with floor.worker(NIBBLE_SERVE_SLOTS="1"):
        deployment_id = floor.deploy("tiny", replicas=3)
        said = (
            "2 of 3 replicas wait: none of 1 slot is free (1 worker); NIBBLE_SERVE_SLOTS gives a worker more"
        )
        wait_until(lambda: said in floor.view(deployment_id)["reason"], 30)


def test_without_a_worker_a_deployment_says_what_it_waits_for(floor: Floor) -> None:
    deployment_id = floor.deploy("tiny", engine="vllm", vllm={"tensor_parallel_size": 2})
    view = floor.view(deployment_id)
    assert (view["state"], view["vllm"]["tensor_parallel_size"]) == ("starting", 2)
    assert "no worker takes the queue `serve`" in view["reason"]
    refused = floor.chat("tiny")
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
    assert refused.headers["retry-after"]
    assert floor.client.delete(f"/v1/deployments/{deployment_id}").status_code == 204
    assert floor.client.get(f"/v1/deployments/{deployment_id}").status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"name": "taken"}, 409, "deployment_name_taken"),
        ({"artifact": "art_01ARZ3NDEKTSV4RRFFQ69G5FAV"}, 404, "artifact_not_found"),
        ({"name": "a//b"}, 422, "validation_failed"),
        ({"replicas": 0}, 422, "validation_failed"),
        ({"engine": "sglang"}, 422, "validation_failed"),
        ({"vllm": {"max_num_seqs": 4}}, 422, "validation_failed"),
        ({"engine": "vllm", "vllm": {"api_key": "x"}}, 422, "validation_failed"),
        ({"idle": 1}, 422, "validation_failed"),
    ],
)
def test_what_can_not_be_served_is_refused(
    floor: Floor, change: dict[str, object], status: int, code: str
) -> None:
    artifact = floor.artifact()
    floor.deploy("taken", artifact)
    answer = floor.client.post("/v1/deployments", json={"artifact": artifact, "name": "free", **change})
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_deployments_are_listed_in_pages(floor: Floor) -> None:
    artifact = floor.artifact()
    ids = [floor.deploy(f"d{index}", artifact) for index in range(3)]
    page = floor.client.get("/v1/deployments", params={"limit": 2}).json()
    assert [view["id"] for view in page["data"]] == sorted(ids, reverse=True)[:2]
    last = floor.client.get("/v1/deployments", params={"after": page["next"]}).json()
    assert ([view["id"] for view in last["data"]], last["has_more"]) == ([min(ids)], False)
    assert floor.client.get("/v1/deployments", params={"after": "x"}).status_code == 400


@pytest.mark.usefixtures("worker")
def test_tenants_and_scopes(floor: Floor) -> None:
    service, deployment_id = floor.service, floor.ready("tiny")
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as other:
        assert other.get(f"/v1/deployments/{deployment_id}").status_code == 404
        assert other.delete(f"/v1/deployments/{deployment_id}").status_code == 404
        assert other.get("/v1/deployments").json()["data"] == []
        assert other.get("/v1/models").json()["data"] == []
        assert other.get("/v1/models/tiny").status_code == 404
        refused = floor.chat("tiny", other)
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (
        "model_not_found",
        "invalid_request_error",
        "model",
    )
    with service.client_with(service.key(Scope.INFERENCE)) as speaker:
        assert floor.chat("tiny", speaker).status_code == 200
        assert speaker.get(f"/v1/deployments/{deployment_id}").status_code == 403
    with service.client_with(service.key(Scope.JOBS_READ)) as reader:
        refused = floor.chat("tiny", reader)
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "invalid_request_error")
        deploys = {"model": "x", "deploy": {"name": "y"}}
    with service.client_with(service.key(Scope.JOBS_WRITE)) as submitter:
        assert submitter.post("/v1/jobs", json=deploys).status_code == 403
    with service.client_with("nib_wrong") as stranger:
        refused = floor.chat("tiny", stranger)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "invalid_request_error")


def test_errors_of_inference_routes_have_openais_shape(floor: Floor) -> None:
    post = floor.client.post
    answers = {
        "not json": (post("/v1/chat/completions", content=b"{"), 400, "json_invalid"),
        "too deep": (post("/v1/chat/completions", content=b"[" * 50_000), 400, "json_invalid"),
        "no model": (post("/v1/completions", json={}), 400, "model_missing"),
        "unknown": (post("/v1/completions", json={"model": "x"}), 404, "model_not_found"),
        "too large": (post("/v1/completions", content=b"x" * 200_000), 413, "body_too_large"),
        "method": (floor.client.get("/v1/chat/completions"), 405, "method_not_allowed"),
    }
    for answer, status, code in answers.values():
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.usefixtures("worker")
def test_a_caller_who_leaves_cancels_the_request(floor: Floor, gate: Path) -> None:
    deployment_id = floor.ready("tiny")
    with floor.stream("tiny", gate=str(gate)) as lines:
        next(lines)
    url = floor.server_url(deployment_id)
    wait_until(lambda: "cancelled 1" in floor.client.get(f"{url}/metrics").text)
    # A socket of our own, since its end must come while the answer is awaited.
    body = json.dumps({"model": "tiny", "gate": str(gate)}).encode()
    address = urlsplit(floor.service.url)
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Authorization: Bearer {ADMIN_KEY}\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
    with socket.create_connection((str(address.hostname), int(str(address.port)))) as caller:
        caller.sendall(head.encode() + body)
        wait_until(lambda: floor.running(deployment_id) == 1)
    wait_until(lambda: "cancelled 2" in floor.client.get(f"{url}/metrics").text)
