from __future__ import annotations

import json
import threading

import httpx
import pytest

from app.core.records.job import JobState, transition
from tests.integration.api_service import Service

STREAM = {"Accept": "text/event-stream"}


def streamed(answer: httpx.Response) -> list[dict[str, str]]:
    """The events of a stream, as their fields."""
    blocks = [block for block in answer.text.split("\n\n") if block.startswith("id:")]
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]


def test_events_come_in_pages(service: Service) -> None:
    job_id = service.submit()["id"]
    for n in range(4):
        service.store.append_event(job_id, "note", {"n": n})
    first = service.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 2}).json()
    assert [event["kind"] for event in first["data"]] == ["state", "note"]
    assert first["data"][0]["payload"] == {"state": "queued", "attempt": 0}
    assert first["data"][0]["at"].endswith("Z")
    assert first["has_more"]
    second = service.client.get(f"/v1/jobs/{job_id}/events", params={"after": first["next"]}).json()
    assert [event["payload"]["n"] for event in second["data"]] == [1, 2, 3]
    assert not second["has_more"]
    tail = service.client.get(f"/v1/jobs/{job_id}/events", params={"after": second["next"]}).json()
    assert (tail["data"], tail["next"]) == ([], second["next"])


def test_a_stream_follows_a_job_to_its_end(service: Service) -> None:
    """What follows from the end is part of it: a deployment, told after the end."""
    job_id = service.submit(deploy={"name": "served"}, formats=["awq"])["id"]
    artifact = service.publish(job_id, {"config.json": b"{}"}).id
    answers: list[httpx.Response] = []
    follower = threading.Thread(
        target=lambda: answers.append(service.client.get(f"/v1/jobs/{job_id}/events", headers=STREAM))
    )
    follower.start()
    service.claim(job_id)
    service.store.append_event(job_id, "note", {"code": "fallback"})
    service.store.update(
        job_id, lambda job: transition(job, JobState.SUCCEEDED, artifacts=(artifact,)), attempt=1
    )
    assert service.outcome.follow_up(job_id)
    follower.join()
    events = streamed(answers[0])
    assert answers[0].headers["content-type"].startswith("text/event-stream")
    assert [event["event"] for event in events] == ["state", "state", "note", "state", "deployed"]
    assert json.loads(events[-2]["data"])["payload"]["state"] == "succeeded"
    assert json.loads(events[-1]["data"])["payload"]["artifact"] == artifact


def test_a_stream_does_not_wait_for_ever_for_what_follows_from_the_end(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.waiting.RECHECK_S", 0.05)
    job_id = service.submit()["id"]
    service.store.update(job_id, lambda job: transition(job, JobState.CANCELLED))
    events = streamed(service.client.get(f"/v1/jobs/{job_id}/events", headers=STREAM))
    assert [json.loads(event["data"])["payload"]["state"] for event in events] == ["queued", "cancelled"]
    assert not service.store.is_settled(job_id)


def test_a_stream_resumes_after_the_last_event(service: Service) -> None:
    job_id = service.submit()["id"]
    service.end(job_id)
    whole = streamed(service.client.get(f"/v1/jobs/{job_id}/events", headers=STREAM))
    headers = {**STREAM, "Last-Event-ID": whole[0]["id"]}
    rest = streamed(service.client.get(f"/v1/jobs/{job_id}/events", headers=headers))
    assert rest == whole[1:]
    headers["Last-Event-ID"] = whole[-1]["id"]
    assert service.client.get(f"/v1/jobs/{job_id}/events", headers=headers).status_code == 204


@pytest.mark.parametrize("event_id", ["x", "1", "1-", "(1-1", "$"])
def test_what_is_no_event_id_is_refused(service: Service, event_id: str) -> None:
    job_id = service.submit()["id"]
    answer = service.client.get(f"/v1/jobs/{job_id}/events", params={"after": event_id})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")
    resumed = service.client.get(f"/v1/jobs/{job_id}/events?after=7", headers={"Last-Event-ID": "1-1"})
    assert (resumed.status_code, resumed.json()["code"]) == (400, "invalid_cursor")
