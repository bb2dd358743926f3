"""The Python client that openapi-generator generates, as the package `generated`."""

from __future__ import annotations

import hashlib
import time

from generated import ApiClient, Configuration
from generated.api.artifacts_api import ArtifactsApi
from generated.api.jobs_api import JobsApi
from generated.exceptions import ApiException, NotFoundException
from generated.models import JobSubmission, JobView
from rows import SCENE, report, same

client = ApiClient(Configuration(host=SCENE.url, access_token=SCENE.key))
api, artifacts = JobsApi(client), ArtifactsApi(client)
jobs: list[JobView] = []


def submit() -> None:
    answer = api.submit_job_with_http_info(JobSubmission(model=SCENE.model), idempotency_key="two")
    same([answer.status_code, answer.data.state], [202, "queued"])
    jobs.append(answer.data)


def poll() -> None:
    """An unchanged job is an error 304 to this client, and a wait ends with the change."""
    first = api.read_job_with_http_info(jobs[0].id)
    etag = (first.headers or {})["etag"]
    try:
        api.read_job(jobs[0].id, if_none_match=etag)
    except ApiException as unchanged:
        same(unchanged.status, 304)
    state, deadline = "queued", time.monotonic() + 60
    while state != "succeeded":
        assert time.monotonic() < deadline, state
        answer = api.read_job_with_http_info(jobs[0].id, if_none_match=etag, prefer="wait=20")
        etag, state = (answer.headers or {})["etag"], answer.data.state
        jobs.append(answer.data)


def events() -> None:
    page = api.read_events(jobs[0].id, limit=2)
    same([len(page.data), page.has_more], [2, True])
    rest = api.read_events(jobs[0].id, after=page.next)
    response = api.read_events_without_preload_content(jobs[0].id, _headers={"Accept": "text/event-stream"})
    lines = response.data.decode().splitlines()
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    same(ids, [event.id for event in [*page.data, *rest.data]])


def download() -> None:
    artifact = artifacts.read_artifact(jobs[-1].artifacts[0])
    (file,) = artifact.files
    content = artifacts.read_file(artifact.id, file.path)
    same([len(content), hashlib.sha256(content).hexdigest()], [file.size, file.sha256])
    part = artifacts.read_file_with_http_info(artifact.id, file.path, range="bytes=2-5")
    same([part.status_code, bytes(part.data)], [206, bytes(content[2:6])])


def errors() -> None:
    try:
        api.read_job("job_" + "0" * 26)
    except NotFoundException as refusal:
        same([refusal.data.status, refusal.data.code], [404, "job_not_found"])
    else:
        raise AssertionError("no such job was answered with one")


report("openapi-generator-cli", (), {
    "submit": submit, "poll": poll, "events": events, "download": download, "errors": errors,
})  # fmt: skip
