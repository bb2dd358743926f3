"""Deployments for tests: a running API, real workers of the queue `serve`, stand-in servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from app.core.deployments.deployment_store import DeploymentStore
from tests.integration.api_service import Service
from tests.integration.workshop import REPOSITORY, processes_with
from tests.waiting import wait_until


class Floor:
    """Everything around a deployment."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.client = service.client
        self.deployments = DeploymentStore(service.redis)

    def artifact(self, *, tenant: str = "default", **behaviour: object) -> str:
        """An artifact whose servers behave as told (stand_in_server)."""
        job_id = self.service.submit()["id"]
        files = {"stand_in.json": json.dumps(behaviour).encode(), "weights/a.bin": b"x" * 1000}
        return self.service.publish(job_id, files, tenant=tenant).id

    def deploy(self, name: str, artifact: str | None = None, **body: object) -> str:
        """Id of a new deployment."""
        body = {"artifact": artifact or self.artifact(), "name": name, **body}
        answer = self.client.post("/v1/deployments", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def view(self, deployment_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/deployments/{deployment_id}")
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def await_state(self, deployment_id: str, state: str) -> dict[str, Any]:
        wait_until(lambda: self.view(deployment_id)["state"] == state, 30)
        return self.view(deployment_id)

    def ready(self, name: str, **body: object) -> str:
        """Id of a new deployment that the gateway relays to, with all its replicas."""
        deployment_id = self.deploy(name, **body)
        self.await_servers(deployment_id, int(str(body.get("replicas", 1))))
        wait_until(lambda: self.chat(name).status_code == 200, 30)
        return deployment_id

    def await_servers(self, deployment_id: str, count: int) -> None:
        def ready() -> int:
            return sum(server["state"] == "ready" for server in self.view(deployment_id)["servers"])

        wait_until(lambda: ready() == count, 30)

    def chat(self, name: str, client: httpx.Client | None = None, **fields: object) -> httpx.Response:
        return (client or self.client).post("/v1/chat/completions", json={"model": name, **fields})

    @contextmanager
    def stream(self, name: str, **fields: object) -> Iterator[Iterator[str]]:
        """The lines of a stream."""
        body = {"model": name, "stream": True, **fields}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield (line for line in answer.iter_lines() if line)

    def server_url(self, deployment_id: str, slot: int = 0) -> str:
        live = self.deployments.get("default", deployment_id)
        return str(next(each.url for each in live.replicas if each.slot == slot))

    def running(self, deployment_id: str, slot: int = 0) -> int:
        """How many requests a server works on, as it says itself."""
        text = httpx.get(f"{self.server_url(deployment_id, slot)}/metrics").text
        return int(float(text.splitlines()[0].rpartition(" ")[2]))

    def server_pids(self, deployment_id: str, slot: int = 0) -> list[int]:
        return processes_with(f"serve-{deployment_id}-{slot}")

    def servers(self) -> list[int]:
        """Every process of this test's workers, and their servers."""
        return processes_with(str(self.service.settings.state_dir))

    @contextmanager
    def worker(
        self, name: str = "one", device: str = "cpu", *, real: bool = False, **environment: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A worker process over the state folder of the API; its servers are stand-ins unless `real`."""
        settings = self.service.settings
        chosen = {
            **os.environ,
            "NIBBLE_STATE_DIR": str(settings.state_dir),
            "NIBBLE_REDIS_URL": str(settings.redis_url),
            "NIBBLE_MODEL_ROOTS": os.pathsep.join(map(str, settings.model_roots)),
            "NIBBLE_DRAIN_S": "20",
            **environment,
        }
        stand_in = ["tests.integration.stand_in_serving_worker", name, device]
        own = ["workers.replicas.replica_supervisor", "--name", name, "--device", device]
        command = [sys.executable, "-m", *(own if real else stand_in)]
        with (
            (settings.state_dir / f"{name}.log").open("ab") as log,
            subprocess.Popen(
                command, env=chosen, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
            ) as process,
        ):
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def log_of(self, name: str = "one") -> str:
        return (self.service.settings.state_dir / f"{name}.log").read_text()
