"""The routing table of inference requests, read from Redis by a thread and kept while Redis is down."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from app.core.changes.redis_keys import DEPLOYMENT_CHANGES
from app.core.deployments.deployment import Deployment, Goal, LiveDeployment
from app.core.deployments.deployment_store import DeploymentStore
from app.core.errors import NibbleError

log = logging.getLogger(__name__)

REFRESH_S = 0.5
RETRY_S = 0.5
# After Redis recovers, replicas missing from it stay in the table until their workers register again.
RECOVERY_S = 10.0

Key = tuple[str, str]  # tenant, name


class RoutingTable(threading.Thread):
    """Deployments by tenant and name. Readers get a snapshot without waiting."""

    def __init__(self, redis: Redis, store: DeploymentStore) -> None:
        super().__init__(name="routing", daemon=True)
        self._redis: Any = redis
        self._store = store
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._table: dict[Key, LiveDeployment] = {}
        self._used: dict[str, Deployment] = {}
        self._failed_at: float | None = None
        self.is_offline = False  # whether the last read of Redis failed

    def find(self, tenant: str, name: str) -> LiveDeployment | None:
        return self._table.get((tenant, name))

    def of_tenant(self, tenant: str) -> list[LiveDeployment]:
        """Each once, however many names it has."""
        return [
            live for (owner, name), live in self._table.items() if owner == tenant and name == live.spec.name
        ]

    def note_use(self, deployment: Deployment) -> None:
        """Note that the deployment is in use; the thread writes it to Redis."""
        self._used[deployment.id] = deployment

    def refresh(self) -> None:
        """Read the deployments now, and drop deleted ones without servers."""
        with self._lock:
            lives = self._store.all()
            table = {(live.deployment.tenant, name): live for live in lives for name in live.deployment.names}
            if self._failed_at is not None and time.monotonic() - self._failed_at < RECOVERY_S:
                table = {key: self._with_known_replicas(key, live) for key, live in table.items()}
            self._table = table
            for live in lives:
                if live.deployment.goal is Goal.REMOVE and not live.replicas:
                    self._store.forget(live.deployment)

    def _with_known_replicas(self, key: Key, live: LiveDeployment) -> LiveDeployment:
        before = self._table.get(key)
        if before is None or before.id != live.id or not live.deployment.wants_servers:
            return live
        present = {replica.slot for replica in live.replicas}
        missing = tuple(replica for replica in before.replicas if replica.slot not in present)
        return live.model_copy(update={"replicas": (*live.replicas, *missing)})

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._follow()
            except RedisError as fault:
                log.warning("routing keeps its table: %s", fault)
                self.is_offline = True
                self._failed_at = time.monotonic()
                self._stopped.wait(RETRY_S)

    def _follow(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(DEPLOYMENT_CHANGES)
            while not self._stopped.is_set():
                self._pass()
                channel.get_message(timeout=REFRESH_S)

    def _pass(self) -> None:
        try:
            self.refresh()
        except NibbleError as fault:
            log.warning("routing keeps its table: %s", fault.message)
        self.is_offline = False
        used, self._used = self._used, {}
        if used:
            self._store.touch(used.values())

    def stop(self) -> None:
        self._stopped.set()
        self.join()
