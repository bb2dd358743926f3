from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from app.core.access.api_keys import Scope
from app.core.errors import JobFault
from app.core.jobs.job_queue import Place
from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
from app.core.records.job import JobState, Problem, Progress
from tests.integration.api_service import MODEL, Service
from tests.waiting import wait_until


def test_a_submitted_job_is_recorded_and_queued(service: Service) -> None:
    answer = service.client.post("/v1/jobs", json={"model": MODEL, "labels": {"team": "search"}})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["self"]
    assert answer.headers["retry-after"]
    assert (job["object"], job["state"], job["attempt"], job["labels"]) == (
        "job", "queued", 0, {"team": "search"},
    )  # fmt: skip
    assert job["created_at"].endswith("Z")
    assert datetime.fromisoformat(job["created_at"]).utcoffset() is not None
    assert service.queue.locate(service.store.load(job["id"])) is Place.WAITING
    assert service.client.get(answer.headers["location"]).json() == job


def test_a_job_has_the_fields_of_the_contract(service: Service) -> None:
    assert list(service.submit()) == [
        "object", "id", "state", "stage", "progress", "attempt", "created_at", "started_at", "finished_at",
        "spec", "labels", "error", "worker", "artifacts", "figures", "retry_of", "reused_from",
        "has_hub_token", "links",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "validation_failed", "model"),
        ({"model": MODEL, "zip": 1}, "validation_failed", "zip"),
        ({"model": MODEL, "recipe": {"bits": 5}}, "validation_failed", "recipe.bits"),
        ({"model": MODEL, "target": {}}, "validation_failed", "target"),
        ({"model": MODEL, "target": {"max_kl": 0}}, "validation_failed", "target.max_kl"),
        ({"model": "../../etc/passwd"}, "model_reference_invalid", "model"),
        ({"model": "file:///etc"}, "model_path_forbidden", "model"),
        ({"model": MODEL, "formats": ["awq"], "recipe": {"bits": 3}}, "format_cannot_hold_recipe", "formats"),
        ({"model": MODEL, "formats": ["gptq"]}, "format_cannot_hold_recipe", "formats"),
        ({"model": MODEL, "calibration": {"texts": ["x"]}}, "text_too_short", "calibration.texts"),
    ],
)
def test_a_refused_body_leaves_nothing_behind(
    service: Service, body: dict[str, object], code: str, param: str
) -> None:
    for route in ("/v1/jobs", "/v1/estimates"):
        answer = service.client.post(route, json=body)
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert (answer.status_code, problem["code"], problem["param"]) == (422, code, param)
        assert problem["remedy"]
    assert service.client.get("/v1/jobs").json()["data"] == []


def unsafe_models() -> dict[str, tuple[dict[str, bytes], str]]:
    """Files that are added to a model's config, and the code of the refusal."""
    config, header = b'{"model_type": "llama"}', b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    unknown, mapped = b'{"model_type": "x"}', b'{"model_type": "x", "auto_map": {"AutoModel": "x.Y"}}'
    length = len(header).to_bytes(8, "little")
    sound = {"config.json": config, "model.safetensors": length + header + bytes(4)}
    return {
        "pickles": ({"config.json": config, "pytorch_model.bin": b"x"}, "model_pickle_only"),
        "python": ({**sound, "config.json": unknown, "modeling_x.py": b""}, "model_remote_code"),
        "auto_map": ({**sound, "config.json": mapped}, "model_remote_code"),
        "an unknown model": ({**sound, "config.json": unknown}, "architecture_unsupported"),
        "truncated": ({**sound, "model.safetensors": length + header[:20]}, "model_header_invalid"),
        "cut": ({**sound, "model.safetensors": length + header + bytes(3)}, "model_header_invalid"),
        "oversized": ({**sound, "model.safetensors": b"\xff" * 7 + bytes(9)}, "model_header_invalid"),
        "no layers": (sound, "config_invalid"),
    }


def test_an_unsafe_model_is_refused(service: Service, tmp_path: Path) -> None:
    for name, (files, code) in unsafe_models().items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        answer = service.client.post("/v1/jobs", json={"model": folder.as_uri()})
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["param"]) == (422, code, "model"), name
        assert problem["remedy"]
    assert service.client.get("/readyz").status_code == 200
    assert service.client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(("content", "code"), [(b"{", "json_invalid"), (b"[]", "validation_failed")])
def test_an_unreadable_body_is_refused(service: Service, content: bytes, code: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = service.client.post("/v1/jobs", content=content, headers=headers)
    assert (answer.json()["code"], answer.json()["status"]) == (code, answer.status_code)
    assert answer.status_code in (400, 422)


def test_a_body_that_is_not_sent_as_json_is_told_so(service: Service) -> None:
    answer = service.client.post("/v1/jobs", content=b'{"model": "a/b"}')
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert "Content-Type application/json" in answer.json()["remedy"]


def test_a_full_queue_answers_429(service: Service) -> None:
    for _ in range(service.settings.queue_limit):
        service.submit()
    answer = service.client.post("/v1/jobs", json={"model": MODEL})
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
    assert answer.headers["retry-after"]


def test_the_same_idempotency_key_gives_the_same_job(service: Service) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers)
    again = service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    other = service.client.post("/v1/jobs", json={"model": MODEL, "priority": "high"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_late_repetition_does_not_make_a_deleted_job_again(service: Service) -> None:
    """Its artifacts may live on, and are named after it."""
    headers = {"Idempotency-Key": "k"}
    job_id = service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers).json()["id"]
    service.end(job_id)
    assert service.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    again = service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers)
    assert (again.status_code, again.json()["code"]) == (409, "idempotency_key_spent")
    assert job_id in again.json()["detail"]
    assert service.client.get("/v1/jobs").json()["data"] == []


def test_fifty_parallel_requests_with_one_key_make_one_job(service: Service) -> None:
    def submit(_: int) -> httpx.Response:
        return service.client.post("/v1/jobs", json={"model": MODEL}, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(submit, range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 49 + [202]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum(service.queue.depths().values()) == 1


def test_a_refused_body_does_not_use_up_its_key(service: Service) -> None:
    headers = {"Idempotency-Key": "k"}
    refused = service.client.post("/v1/jobs", json={"model": "file:///etc"}, headers=headers)
    accepted = service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers)
    assert (refused.status_code, accepted.status_code) == (422, 202)


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_an_unusable_idempotency_key_is_refused(service: Service, key: str) -> None:
    answer = service.client.post("/v1/jobs", json={"model": MODEL}, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["code"]) == (400, "idempotency_key_invalid")


def test_submitting_can_wait_for_the_end(service: Service) -> None:
    def finish() -> None:
        wait_until(lambda: service.store.in_state(JobState.QUEUED))
        service.end(service.store.in_state(JobState.QUEUED)[0])

    thread = threading.Thread(target=finish)
    thread.start()
    answer = service.client.post("/v1/jobs", json={"model": MODEL}, headers={"Prefer": "wait=20"})
    thread.join()
    assert (answer.status_code, answer.json()["state"]) == (202, "succeeded")
    assert answer.headers["preference-applied"] == "wait=20"


def test_an_unchanged_job_is_not_sent_again(service: Service) -> None:
    job_id = service.submit()["id"]
    first = service.client.get(f"/v1/jobs/{job_id}")
    headers = {"If-None-Match": first.headers["etag"]}
    again = service.client.get(f"/v1/jobs/{job_id}", headers=headers)
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    service.claim(job_id)
    changed = service.client.get(f"/v1/jobs/{job_id}", headers=headers)
    assert (changed.status_code, changed.json()["state"]) == (200, "running")
    assert changed.headers["etag"] != first.headers["etag"]


def test_a_long_poll_ends_with_a_change(service: Service) -> None:
    job_id = service.submit()["id"]
    etag = service.client.get(f"/v1/jobs/{job_id}").headers["etag"]
    with ThreadPoolExecutor(1) as pool:
        headers = {"If-None-Match": etag, "Prefer": "wait=30"}
        waiting = pool.submit(service.client.get, f"/v1/jobs/{job_id}", headers=headers)
        time.sleep(0.2)
        assert not waiting.done()
        service.claim(job_id)
        answer = waiting.result()
    assert (answer.status_code, answer.json()["state"]) == (200, "running")


def test_a_long_poll_without_a_change_says_so(service: Service) -> None:
    job_id = service.submit()["id"]
    etag = service.client.get(f"/v1/jobs/{job_id}").headers["etag"]
    headers = {"If-None-Match": etag, "Prefer": "wait=1"}
    assert service.client.get(f"/v1/jobs/{job_id}", headers=headers).status_code == 304
    assert service.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=1"}).status_code == 200


def test_a_finished_job_is_answered_at_once(service: Service) -> None:
    job_id = service.submit()["id"]
    service.end(job_id)
    answer = service.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60"})
    assert answer.json()["state"] == "succeeded"
    assert "retry-after" not in answer.headers
    assert answer.json()["finished_at"].endswith("Z")


def test_progress_and_errors_are_shown(service: Service) -> None:
    job_id = service.submit()["id"]
    service.claim(job_id)
    progress = Progress(fraction=0.5, layer=3, layers=6, eta_s=4.5)
    service.store.update(job_id, lambda job: job.model_copy(update={"progress": progress}), attempt=1)
    job = service.client.get(f"/v1/jobs/{job_id}").json()
    assert job["progress"] == {"fraction": 0.5, "layer": 3, "layers": 6, "eta_s": 4.5, "use": None}
    problem = Problem.of(JobFault("it broke", remedy="mend it"))
    other = service.submit()["id"]
    service.end(other, JobState.FAILED, error=problem)
    assert service.client.get(f"/v1/jobs/{other}").json()["error"] == {
        "code": "job_failed", "message": "it broke", "remedy": "mend it",
    }  # fmt: skip


def test_brief_lists_are_small_and_tagged(service: Service) -> None:
    job = service.submit()
    answer = service.client.get("/v1/jobs", params={"view": "brief"})
    line = answer.json()["data"][0]
    assert (line["object"], line["id"], line["recipes"]) == ("job.brief", job["id"], ["awq w4 g128"])
    assert "spec" not in line
    again = {"If-None-Match": answer.headers["etag"]}
    assert service.client.get("/v1/jobs", params={"view": "brief"}, headers=again).status_code == 304
    service.submit()
    assert service.client.get("/v1/jobs", params={"view": "brief"}, headers=again).status_code == 200


def test_lists_have_pages_and_filters(service: Service) -> None:
    ids = [service.submit(labels={"n": str(n % 2)})["id"] for n in range(5)]
    service.end(ids[0])
    first = service.client.get("/v1/jobs", params={"limit": 3}).json()
    assert (first["object"], first["has_more"], len(first["data"])) == ("list", True, 3)
    second = service.client.get("/v1/jobs", params={"limit": 3, "after": first["next"]}).json()
    assert (second["has_more"], second["next"]) == (False, None)
    listed = [job["id"] for job in first["data"] + second["data"]]
    assert listed == sorted(ids, reverse=True)
    even = service.client.get("/v1/jobs", params={"label": "n=0", "state": "succeeded"}).json()
    assert [job["id"] for job in even["data"]] == [ids[0]]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("limit=0", 422),
        ("limit=101", 422),
        ("state=sleeping", 422),
        ("page=2", 422),
        ("after=x", 400),
        ("label=x", 400),
    ],
)
def test_a_wrong_query_is_refused(service: Service, query: str, status: int) -> None:
    answer = service.client.get(f"/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["param"]) == (status, query.partition("=")[0])


def test_a_waiting_job_is_cancelled_at_once(service: Service) -> None:
    job_id = service.submit()["id"]
    answer = service.client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert service.queue.locate(service.store.load(job_id)) is Place.GONE
    assert service.client.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"


def test_a_running_job_is_asked_to_stop(service: Service) -> None:
    job_id = service.submit()["id"]
    service.claim(job_id)
    answer = service.client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelling")


def test_a_finished_job_cannot_be_cancelled(service: Service) -> None:
    job_id = service.submit()["id"]
    service.end(job_id)
    answer = service.client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_finished")


def test_a_retry_is_a_new_job_with_the_same_spec(service: Service) -> None:
    job = service.submit(labels={"a": "b"})
    early = service.client.post(f"/v1/jobs/{job['id']}/retry")
    assert (early.status_code, early.json()["code"]) == (409, "job_not_finished")
    service.end(job["id"], JobState.FAILED)
    answer = service.client.post(f"/v1/jobs/{job['id']}/retry")
    again = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"].endswith(again["id"])
    assert (again["retry_of"], again["spec"], again["state"]) == (job["id"], job["spec"], "queued")
    assert again["id"] != job["id"]


def test_a_retry_may_have_more_time_and_compute_anew(service: Service) -> None:
    job = service.submit(timeout_s=2)
    service.end(job["id"], JobState.FAILED)
    body = {"timeout_s": 60, "force": True}
    again = service.client.post(f"/v1/jobs/{job['id']}/retry", json=body).json()
    assert again["spec"] == {**job["spec"], **body}
    refused = service.client.post(f"/v1/jobs/{job['id']}/retry", json={"timeout_s": 0})
    assert (refused.status_code, refused.json()["param"]) == (422, "timeout_s")


def test_jobs_are_searched_by_words(service: Service) -> None:
    search = service.submit(labels={"team": "search"}, recipe={"bits": 3})["id"]
    other = service.submit(labels={"team": "platform"}, recipe={"method": "rtn"})["id"]

    def found(q: str) -> list[str]:
        return [job["id"] for job in service.client.get("/v1/jobs", params={"q": q}).json()["data"]]

    assert found("team=SEARCH") == [search]
    assert found("wikitext rtn") == [other]
    assert found(other[-8:].lower()) == [other]
    assert found("rtn w3") == []
    assert found("  ") == [other, search]


def test_jobs_are_counted_by_state_for_their_tenant(service: Service) -> None:
    service.end(service.submit()["id"], JobState.FAILED)
    service.submit()
    page = service.client.get("/v1/jobs", params={"counts": True, "state": "failed"}).json()
    assert {state: count for state, count in page["counts"].items() if count} == {"queued": 1, "failed": 1}
    assert service.client.get("/v1/jobs").json()["counts"] is None
    with service.client_with(service.key(Scope.ADMIN, tenant="other")) as client:
        assert set(client.get("/v1/jobs", params={"counts": True}).json()["counts"].values()) == {0}


def test_a_result_that_is_used_again_has_its_figures(service: Service) -> None:
    first = service.submit()["id"]
    artifact = service.publish(first, {"a": b"12345"})
    service.end(first, artifacts=(artifact.id,))
    answer = service.client.post("/v1/jobs", json={"model": MODEL})
    job = answer.json()
    assert (job["reused_from"], job["figures"]["bytes"], job["figures"]["kl"]) == (first, 5, None)
    brief = service.client.get("/v1/jobs", params={"view": "brief"}).json()["data"][0]
    assert brief["figures"] == job["figures"]


def test_only_a_finished_job_is_deleted(service: Service) -> None:
    job_id = service.submit()["id"]
    assert service.client.delete(f"/v1/jobs/{job_id}").json()["code"] == "job_not_finished"
    service.end(job_id)
    service.objects.put(f"reports/{job_id}.json", b"{}")
    service.objects.put(f"checkpoints/{job_id}/work/layer.safetensors", b"layer")
    assert service.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert service.client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert service.objects.head(f"reports/{job_id}.json") is None
    assert service.objects.list(f"checkpoints/{job_id}") == []


def test_a_report_is_given_once_it_exists(service: Service) -> None:
    job_id = service.submit()["id"]
    early = service.client.get(f"/v1/jobs/{job_id}/report")
    assert (early.status_code, early.json()["code"]) == (404, "report_not_found")
    service.objects.put(f"reports/{job_id}.json", b'{"version": 1}')
    assert service.client.get(f"/v1/jobs/{job_id}/report").json() == {"version": 1}


@pytest.mark.parametrize(
    "job_id", ["job_01M823S510D0DJEWVM94T0ZK2G", "art_01M823S510V90K76AWVS8MS1FM", "x", "..", "%2e%2e"]
)
def test_what_is_no_job_answers_404(service: Service, job_id: str) -> None:
    for method, route in (
        ("GET", ""),
        ("GET", "/report"),
        ("GET", "/events"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
    ):
        answer = service.client.request(method, f"/v1/jobs/{job_id}{route}")
        assert answer.status_code in (404, 405)
        if job_id == "..":  # clients resolve it: another route below /v1
            assert "error" in answer.json()
        else:
            assert answer.headers["content-type"] == "application/problem+json"


def test_an_estimate_names_figures_and_decisions(service: Service) -> None:
    estimate = service.client.post("/v1/estimates", json={"model": MODEL}).json()
    assert estimate["object"] == "estimate"
    assert estimate["basis"] == "nominal"
    assert estimate["time_s"] == pytest.approx(sum(estimate["stages"].values()), abs=1e-6)
    assert estimate["output_bytes"] > estimate["download_bytes"] == 0
    assert {linear["bits"] for linear in estimate["candidates"][0]["linears"]} == {4}
    assert service.client.get("/v1/jobs").json()["data"] == []


def test_an_estimate_tells_of_the_device_that_serves(service: Service) -> None:
    def told(**body: object) -> list[str]:
        answer = service.client.post("/v1/estimates", json={"model": MODEL, **body}).json()
        return [note for note in answer["notes"] if "served on" in note]

    def beat(name: str, device_name: str) -> None:
        now = datetime.now(UTC)
        record = WorkerRecord(
            name=name, host="h", pid=1, device="cuda:0", device_name=device_name, queue="serve",
            started_at=now, heartbeat_at=now,
        )  # fmt: skip
        WorkerRegistry(service.redis).beat(record, ttl_s=30)

    assert told() == []
    (note,) = told(serve_on="b200")
    assert "served on b200, w4a16: vLLM 0.33.0 reads its weights alone" in note
    assert "estimated from bytes and rates, not measured" in note
    beat("one", "NVIDIA H100 80GB HBM3")
    (note,) = told()
    assert "served on h100" in note
    (note,) = told(serve_on="l4")
    assert "served on l4" in note
    beat("two", "NVIDIA L4")
    assert told() == []
    refused = service.client.post("/v1/estimates", json={"model": MODEL, "serve_on": "abacus"})
    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, "serve_on")


def test_a_recommendation_names_a_recipe_that_can_be_submitted(service: Service) -> None:
    body = {"model": MODEL, "gpu": "h100", "memory": "24GB"}
    answer = service.client.post("/v1/recommendations", json=body)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["object"], found["device"], found["memory_bytes"]) == ("recommendation", "h100", 24 * 10**9)
    chosen = found["recommended"]
    estimate = service.client.post("/v1/estimates", json={"model": MODEL, "recipe": chosen["recipe"]}).json()
    assert estimate["output_bytes"] == chosen["output_bytes"]
    assert chosen["cache_tokens"] > 10**6
    speeds = [speed["verdict"] for speed in chosen["advice"]["speeds"]]
    assert speeds == ["faster"] * 3
    assert service.client.get("/v1/jobs").json()["data"] == []
    for change, code in (({"gpu": "abacus"}, "validation_failed"), ({"model": "file:///nowhere"}, None)):
        refused = service.client.post("/v1/recommendations", json={**body, **change})
        assert refused.status_code in (403, 404, 422)
        assert code in (None, refused.json()["code"])
    unknown = service.client.post("/v1/recommendations", json={"model": MODEL, "gpu": "cpu"}).json()
    assert (unknown["code"], unknown["param"]) == ("memory_unknown", "memory")


def test_a_target_of_bytes_is_refused_with_the_smallest_size(service: Service) -> None:
    for route in ("/v1/jobs", "/v1/estimates"):
        answer = service.client.post(route, json={"model": MODEL, "target": {"max_size": 1000}})
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["param"]) == (
            422, "target_size_impossible", "target.max_size",
        )  # fmt: skip
        assert "the smallest is" in problem["detail"]
    job = service.client.post("/v1/jobs", json={"model": MODEL, "target": {"max_size": "4MB"}}).json()
    assert (job["spec"]["recipe"]["bits"], job["spec"]["recipe"]["method"]) == (3, "awq")


def test_own_answers_need_a_worker_with_room_for_the_model(service: Service) -> None:
    registry, now = WorkerRegistry(service.redis), datetime.now(UTC)
    body = {"model": MODEL, "calibration": {"dataset": "self"}}

    def beat(name: str, memory: int | None, **changes: object) -> None:
        record = {"name": name, "host": "h", "pid": 1, "device": "cpu", "memory_total": memory, **changes}
        registry.beat(WorkerRecord(started_at=now, heartbeat_at=now, **record), ttl_s=30)

    assert service.client.post("/v1/jobs", json=body).status_code == 202  # no worker says what it has
    beat("small", 10**6)
    beat("server", 10**12, queue="serve")
    for route in ("/v1/jobs", "/v1/estimates"):
        answer = service.client.post(route, json=body)
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["param"]) == (
            422, "model_too_large", "calibration.dataset",
        )  # fmt: skip
        assert "the largest device of a worker has 0.0 GB" in problem["detail"]
        assert service.client.post(route, json={"model": MODEL}).is_success
    beat("silent", None)
    assert service.client.post("/v1/jobs", json=body).status_code == 202
    registry.remove("silent")
    beat("large", 10**12)
    estimate = service.client.post("/v1/estimates", json=body)
    assert estimate.status_code == 200
    assert any("65536 tokens, and is held whole" in note for note in estimate.json()["notes"])


def test_no_model_writes_its_evaluation_text(service: Service) -> None:
    answer = service.client.post("/v1/jobs", json={"model": MODEL, "evaluation": {"dataset": "self"}})
    assert (answer.status_code, answer.json()["param"]) == (422, "evaluation.dataset")
