"""The client that openapi-python-client generates, as the package `generated`."""

from __future__ import annotations

import hashlib
import time

from generated import AuthenticatedClient
from generated.api.artifacts import read_artifact, read_file
from generated.api.jobs import read_events, read_job, submit_job
from generated.models import ArtifactView, EventList, JobSubmission, JobView, ProblemDocument
from rows import SCENE, report, same

client = AuthenticatedClient(base_url=SCENE.url, token=SCENE.key)
jobs: list[JobView] = []


def submit() -> None:
    answer = submit_job.sync_detailed(
        client=client, body=JobSubmission(model=SCENE.model), idempotency_key="one"
    )
    assert isinstance(answer.parsed, JobView)
    same([answer.status_code, answer.parsed.state], [202, "queued"])
    same(answer.headers["location"], f"/v1/jobs/{answer.parsed.id}")
    jobs.append(answer.parsed)


def poll() -> None:
    """An unchanged job is no body, and a wait ends with the change."""
    first = read_job.sync_detailed(jobs[0].id, client=client)
    same(
        read_job.sync_detailed(jobs[0].id, client=client, if_none_match=first.headers["etag"]).status_code,
        304,
    )
    etag, state, deadline = first.headers["etag"], "queued", time.monotonic() + 60
    while state != "succeeded":
        assert time.monotonic() < deadline, state
        answer = read_job.sync_detailed(jobs[0].id, client=client, if_none_match=etag, prefer="wait=20")
        assert isinstance(answer.parsed, JobView)
        assert answer.headers["etag"] != etag
        etag, state = answer.headers["etag"], answer.parsed.state
        jobs.append(answer.parsed)


def events() -> None:
    page = read_events.sync(jobs[0].id, client=client, limit=2)
    assert isinstance(page, EventList)
    same([len(page.data), page.has_more], [2, True])
    rest = read_events.sync(jobs[0].id, client=client, after=page.next_)
    assert isinstance(rest, EventList)
    assert rest.data
    headers, url = {"Accept": "text/event-stream"}, f"/v1/jobs/{jobs[0].id}/events"
    with client.get_httpx_client().stream("GET", url, headers=headers) as stream:
        ids = [line.removeprefix("id: ") for line in stream.iter_lines() if line.startswith("id: ")]
    same(ids, [event.id for event in [*page.data, *rest.data]])


def download() -> None:
    artifact = read_artifact.sync(jobs[-1].artifacts[0], client=client)
    assert isinstance(artifact, ArtifactView)
    (file,) = artifact.files
    content = read_file.sync(artifact.id, file.path, client=client).payload.read()
    same([len(content), hashlib.sha256(content).hexdigest()], [file.size, file.sha256])
    part = read_file.sync_detailed(artifact.id, file.path, client=client, range_="bytes=2-5")
    same([part.status_code, part.parsed.payload.read()], [206, content[2:6]])


def errors() -> None:
    answer = read_job.sync("job_" + "0" * 26, client=client)
    assert isinstance(answer, ProblemDocument)
    same([answer.status, answer.code], [404, "job_not_found"])


report("openapi-python-client", (), {
    "submit": submit, "poll": poll, "events": events, "download": download, "errors": errors,
})  # fmt: skip
