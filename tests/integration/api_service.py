"""A running API for tests: uvicorn in a thread, a real Valkey behind it, clients with keys."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from redis import Redis

from app.core.access.api_keys import KeyStore, Scope, new_key
from app.core.formats.registry import FormatName
from app.core.jobs.job_queue import JobQueue
from app.core.jobs.job_store import JobStore
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.ids import artifact_id
from app.core.records.job import Job, JobState, transition
from app.core.redis.redis_server import connect
from app.core.settings import Settings
from app.core.storage.artifact_store import file_key
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import manifest_key
from app.core.upkeep.janitor import Janitor
from app.server import api_server
from tests.outcomes import outcome_over

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = (EXAMPLES / "wikitext-llama-6m").as_uri()
ADMIN_KEY = "test-admin-key-of-this-service"


class Service:
    """The API's address, and the same stores that it uses."""

    def __init__(self, url: str, settings: Settings, redis: Redis) -> None:
        self.url = url
        self.settings = settings
        self.redis = redis
        self.store = JobStore(redis)
        self.queue = JobQueue(redis, limit=settings.queue_limit)
        self.objects = ObjectStore(settings.object_store_url)
        self.outcome = outcome_over(redis, self.objects, settings)
        self.janitor = Janitor(self.store, self.queue, self.objects, self.outcome, max_attempts=3)
        self.client = self.client_with(ADMIN_KEY)

    def client_with(self, key: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def key(self, *scopes: Scope, tenant: str = "default") -> str:
        key = new_key()
        KeyStore(self.redis).register(key, tenant=tenant, scopes=frozenset(scopes))
        return key

    def submit(self, **body: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/jobs", json={"model": MODEL, **body})
        assert answer.status_code == 202, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def claim(self, job_id: str, attempt: int = 1) -> Job:
        return self.store.claim(job_id, attempt, worker="w", lease_s=30)

    def end(self, job_id: str, state: JobState = JobState.SUCCEEDED, **changes: object) -> Job:
        """What a worker does, without the work."""
        self.claim(job_id)
        ended = self.store.update(job_id, lambda job: transition(job, state, **changes), attempt=1)
        assert self.outcome.follow_up(job_id)
        return ended

    def publish(
        self,
        job_id: str,
        files: dict[str, bytes],
        tenant: str = "default",
        format_name: FormatName = "awq",
    ) -> ArtifactManifest:
        """An artifact of the job with these files."""
        job = self.store.load(job_id)
        manifest = ArtifactManifest(
            id=artifact_id(job_id, 0, format_name),
            tenant=tenant,
            job=job_id,
            created_at=job.created_at,
            model=job.spec.model,
            model_digest="0" * 64,
            recipe=job.spec.recipes[0],
            format=format_name,
            prefix="attempt-1",
            files=tuple(
                ArtifactFile(path=path, size=len(content), sha256=sha256(content).hexdigest())
                for path, content in files.items()
            ),
        )
        for path, content in files.items():
            self.objects.put(file_key(manifest, path), content)
        self.objects.create(manifest_key(manifest.id), manifest.model_dump_json().encode())
        return manifest


@contextmanager
def running_service(settings: Settings) -> Iterator[Service]:
    """The API on a free port until the block ends."""
    server = api_server(settings.model_copy(update={"port": 0}))
    server.config.timeout_graceful_shutdown = 2
    thread = threading.Thread(target=server.run, name="api")
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the API did not start"
            assert time.monotonic() < deadline, "the API did not start in time"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        redis = connect(str(settings.redis_url))
        service = Service(f"http://127.0.0.1:{port}", settings, redis)
        with service.client:
            yield service
        redis.close()
    finally:
        server.should_exit = True
        thread.join()
