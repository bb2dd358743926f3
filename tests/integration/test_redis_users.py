"""The service with the users of docker/redis-users.acl: they may do what it needs, and no more."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.retry import Retry

from app.core.changes.redis_keys import state_key
from app.core.deployments.deployment import DeploymentSpec, Replica, ReplicaState
from app.core.deployments.deployment_store import DeploymentStore
from app.core.deployments.transitions import paused
from app.core.records.ids import new_id
from app.core.records.job import JobState
from app.core.redis.redis_programs import embedded_binary
from app.core.redis.redis_server import connect, wait_for_redis
from app.core.settings import Settings
from tests.integration.api_service import ADMIN_KEY, EXAMPLES, MODEL, running_service
from tests.integration.workshop import Workshop
from tests.waiting import wait_until


class Users(NamedTuple):
    """URLs of one Valkey for each of its users."""

    admin: str
    api: str
    worker: str


@contextmanager
def valkey(folder: Path, *options: str) -> Iterator[Path]:
    """The socket of a server with these options."""
    binary = embedded_binary()
    assert binary is not None
    (folder / "data").mkdir()
    path = folder / "data" / "s"
    command = [binary, *options, "--port", "0", "--unixsocket", str(path), "--dir", str(folder / "data")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield path
        process.terminate()


@pytest.fixture
def users(tmp_path: Path, repository: Path) -> Iterator[Users]:
    rules = (repository / "docker" / "redis-users.acl").read_text()
    rules = rules.replace("API_PASSWORD", "a").replace("WORKER_PASSWORD", "w")
    (tmp_path / "users.acl").write_text(rules + "user admin on >o ~* &* +@all\n")
    with valkey(tmp_path, "--save", "", "--aclfile", str(tmp_path / "users.acl")) as path:
        urls = Users(*(f"unix://{name}@{path}" for name in ("admin:o", "nibble-api:a", "nibble-worker:w")))
        with connect(urls.admin) as client:
            wait_for_redis(client)
        yield urls


def refused(users: Users) -> list[str]:
    """What the server refused since the last look: who, what."""
    with connect(users.admin) as client:
        found = [f"{entry['username']}: {entry['object']}" for entry in client.acl_log()]
        client.acl_log_reset()
    return found


def test_the_service_needs_no_more_than_its_users_may(users: Users, tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {
            "state_dir": tmp_path / "state",
            "redis_url": users.api,
            "model_roots": (EXAMPLES,),
            "bootstrap_api_key": ADMIN_KEY,
            "outgoing_networks": "127.0.0.1/32",
            "janitor_interval_s": 0.2,
            "tenant_jobs": 10,
            "tenant_running_jobs": 2,
            "tenant_requests_per_minute": 10_000,
        }
    )
    workshop = Workshop(connect(users.worker), users.worker, tmp_path / "worker")
    with running_service(settings) as service:
        jobs = [service.submit(webhook={"url": "http://127.0.0.1:9/"})["id"] for _ in range(3)]
        for _ in range(4):
            for route in ("jobs", "workers", "deployments", "models", "keys", "audit", "webhook-secret"):
                service.client.get(f"/v1/{route}").raise_for_status()
            for route in ("", "/events", "/webhook-deliveries"):
                service.client.get(f"/v1/jobs/{jobs[0]}{route}").raise_for_status()
        link = service.client.post("/v1/login-links").json()["path"]
        with service.client_with(None) as browser:
            browser.get(link)
            assert browser.get("/v1/jobs").status_code == 200
        service.janitor.sweep()
        headers = {"Idempotency-Key": "k"}
        service.client.post("/v1/jobs", json={"model": MODEL}, headers=headers).raise_for_status()
        service.client.post(f"/v1/jobs/{jobs[2]}/cancel").raise_for_status()
        assert service.client.get("/metrics").status_code == 200
        assert service.client.get("/readyz").status_code == 200
        with workshop.worker("one"):
            wait_until(lambda: service.store.load(jobs[0]).is_terminal)
        serve_as_a_worker(users)
        service.client.delete(f"/v1/jobs/{jobs[2]}").raise_for_status()
    workshop.redis.close()
    assert refused(users) == []


def serve_as_a_worker(users: Users) -> None:
    with connect(users.worker) as redis:
        store = DeploymentStore(redis)
        deployment = store.create("default", DeploymentSpec(artifact=new_id("art"), name="d"))
        replica = Replica(deployment=deployment.id, slot=0, owner="o", worker="w", engine="transformers",
                          state=ReplicaState.LOADING, since=datetime.now(UTC))  # fmt: skip
        assert store.beat(replica, ttl_s=5)
        assert store.all()
        store.touch([deployment])
        assert store.was_used(deployment)
        assert store.release(replica)
        store.update(deployment.id, paused)
        assert store.forget(deployment)


FORBIDDEN = [
    "CONFIG GET *", "FLUSHALL", "FLUSHDB", "KEYS *", "SHUTDOWN NOSAVE", "MONITOR", "ACL LIST",
    "CLIENT LIST", "SAVE", "REPLICAOF h 1", "MODULE LIST", "GET other", "SET other 1", "SWAPDB 0 1",
    "PUBLISH other x", "MIGRATE h 1 nibble:a 0 1",
]  # fmt: skip
SECRETS = [
    "GET nibble:key:a", "SADD nibble:keys a", "SET nibble:session:a b", "SET nibble:login:a b",
    "GET nibble:webhook-secret:a", "GET nibble:link-secret", "XLEN nibble:audit:a", "SET nibble:limits:a b",
    "GET nibble:idempotency:a",
]  # fmt: skip


def test_compose_gives_each_service_a_user_of_its_own(tmp_path: Path, repository: Path) -> None:
    """With the secrets that the first lines of docker-compose.yml make."""
    text = (repository / "docker-compose.yml").read_text()
    lines = [line[4:] for line in text.splitlines() if line.startswith("#   ")]
    (last,) = (number for number, line in enumerate(lines) if line.startswith("cd .. "))
    (tmp_path / "docker").mkdir()
    shutil.copy(repository / "docker" / "redis-users.acl", tmp_path / "docker")
    subprocess.run(["bash", "-euc", "\n".join(lines[:last])], cwd=tmp_path, check=True)
    secrets, services = tmp_path / "secrets", yaml.safe_load(text)["services"]
    assert {path.name for path in secrets.iterdir()} == set(yaml.safe_load(text)["secrets"])
    assert secrets.stat().st_mode & 0o077 == 0
    _, *options = shlex.split(services["redis"]["command"].replace("/run/secrets", str(secrets)))

    def url(service: str) -> str:
        names = {each["target"]: each["source"] for each in services[service]["secrets"]}
        return (secrets / names["NIBBLE_REDIS_URL"]).read_text().partition("//")[2].partition("@")[0]

    workers = [url(service) for service in ("worker", "server", "worker-gpu", "server-gpu")]
    with valkey(tmp_path, *options) as path:
        check_that_only_the_api_reaches_keys(path, url("api"), workers)


def check_that_only_the_api_reaches_keys(path: Path, api: str, workers: list[str]) -> None:
    with connect(f"unix://{api}@{path}") as redis:
        wait_for_redis(redis)
        redis.set("nibble:key:a", "b")
    for worker in workers:
        with connect(f"unix://{worker}@{path}") as redis, pytest.raises(NoPermissionError):
            redis.get("nibble:key:a")
    # Of its own, since `connect` tries again for seconds what may be a server that starts.
    stranger = Redis(unix_socket_path=str(path), retry=Retry(NoBackoff(), 0))
    with stranger, pytest.raises(AuthenticationError):
        stranger.ping()


KUBECTL = """#!/bin/sh
for word; do
    case "$word" in --from-file=*) cp -r "${word#*=}" secrets ;; esac
done
"""


def manifests(folder: Path) -> Iterator[dict[str, Any]]:
    for path in folder.glob("*.yaml"):
        yield from yaml.safe_load_all(path.read_text())


def mounted(workload: dict[str, Any]) -> dict[str, str]:
    """Keys of the secret by the names of the files that a pod sees."""
    volumes = workload["spec"]["template"]["spec"]["volumes"]
    (secret,) = (volume["secret"] for volume in volumes if "secret" in volume)
    return {item["path"]: item["key"] for item in secret["items"]}


def test_kubernetes_gives_each_pod_a_user_of_its_own(tmp_path: Path, repository: Path) -> None:
    """With the secret that the lines of its page make."""
    folder = repository / "docker" / "kubernetes"
    (script,) = re.findall(r"```sh\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (tmp_path / "docker").mkdir()
    shutil.copy(repository / "docker" / "redis-users.acl", tmp_path / "docker")
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path),
                   "AWS_ACCESS_KEY_ID": "i", "AWS_SECRET_ACCESS_KEY": "k"}  # fmt: skip
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True)
    secrets = tmp_path / "secrets"
    assert not list(tmp_path.glob("tmp.*"))  # secrets stay in the cluster only
    found = list(manifests(folder))
    pods = {each["metadata"]["name"]: each for each in found if each["kind"] in ("Deployment", "StatefulSet")}
    (scaler,) = (each["spec"]["secretTargetRef"] for each in found if each["kind"] == "TriggerAuthentication")
    used = {key for pod in pods.values() for key in mounted(pod).values()} | {each["key"] for each in scaler}
    assert used == {path.name for path in secrets.iterdir()}
    urls = {name: (secrets / mounted(pod)["NIBBLE_REDIS_URL"]).read_text() for name, pod in pods.items()
            if name != "redis"}  # fmt: skip
    names = {name: url.partition("//")[2].partition("@")[0] for name, url in urls.items()}
    (container,) = pods["redis"]["spec"]["template"]["spec"]["containers"]
    places = {"/run/secrets/redis_users": str(secrets / "redis_users"), "/data": str(tmp_path / "data")}
    _, *options = [places.get(word, word) for word in container["command"]]
    with valkey(tmp_path, *options, *container["args"]) as path:
        check_that_only_the_api_reaches_keys(
            path, names["nibble-api"], [names["nibble-worker"], names["nibble-server"]]
        )
        account = {each["parameter"]: (secrets / each["key"]).read_text() for each in scaler}
        check_the_scaler(connect(f"unix://{account['username']}:{account['password']}@{path}"))


def check_the_scaler(redis: Redis) -> None:
    """KEDA asks for a key's size in a script, as its type demands."""
    waiting = state_key(JobState.QUEUED)
    with redis:
        script = "return {redis.call('type', KEYS[1]).ok, redis.call('llen', KEYS[1])}"
        assert redis.eval(script, 1, waiting) == [b"none", 0]
        assert redis.eval("return redis.call('scard', KEYS[1])", 1, waiting) == 0
        for command in (
            *FORBIDDEN,
            *SECRETS,
            f"SADD {waiting} x",
            f"SMEMBERS {waiting}",
            "SCARD nibble:state:running",
            "LLEN rq:queue:nibble-high",
        ):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command.split())


def test_no_user_administers_or_leaves_its_keys(users: Users) -> None:
    for url in (users.api, users.worker):
        with connect(url) as redis:
            for command in FORBIDDEN:
                with pytest.raises(NoPermissionError):
                    redis.execute_command(*command.split())


def test_a_worker_reaches_no_keys_sessions_or_secrets(users: Users) -> None:
    """Neither by itself nor in a script."""
    with connect(users.worker) as redis:
        for command in SECRETS:
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command.split())
            arguments = ", ".join(f"'{word}'" for word in command.split())
            with pytest.raises(ResponseError, match=r"(?i)acl|permission"):
                redis.eval(f"return redis.call({arguments})", 0)
