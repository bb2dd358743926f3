"""`python -m workers.replicas.replica_supervisor` runs inference servers for deployments, without torch.

Each pass reads the deployments, claims free slots, stops what is no longer wanted, unloads what is idle, and
renews the leases of its replicas. Without Redis the servers go on: only the renewals wait.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import uuid4

from redis.exceptions import RedisError

from app.core.deployments.deployment import Deployment, DeploymentState, Goal, LiveDeployment, Replica
from app.core.deployments.deployment_store import DeploymentStore
from app.core.deployments.placement import free_slots, is_replaced, placement
from app.core.deployments.transitions import bereft, loaded, promoted, resting
from app.core.errors import NibbleError, NotFound
from app.core.jobs.worker_registry import WorkerRecord, WorkerRegistry
from app.core.redis.redis_server import connect, resolve_redis, wait_for_redis
from app.core.settings import Settings, make_folder
from app.core.storage.artifact_store import ArtifactStore
from app.core.storage.object_store import ObjectStore
from app.core.telemetry.logs import refusals_logged, set_up_logs
from workers.devices.device_memory import device_memory
from workers.main import describe_worker, device_name, resolve_device, worker_name
from workers.replicas.artifact_cache import ArtifactCache
from workers.replicas.replica import ReplicaKeeper, ServingContext
from workers.replicas.server_process import SERVER_MODULE, vllm_program

log = logging.getLogger(__name__)

Claim = tuple[str, int, int]  # deployment, slot, generation

PASS_S = 0.4
POLL_S = 0.1  # while servers end
REPLICA_TTL_S = 10.0
REGISTRY_S = 5.0
REGISTRY_TTL_S = 20.0
SPREAD_S = 1.0  # a worker leaves a free slot to emptier workers, for so long per server that it runs
FAILED_AGAIN_S = 60.0  # until a worker tries a slot again whose server it could not have, while others serve
SETTLE_S = 3.0  # after Redis was away, in which those whose claims ran out meanwhile take them up again
# A gateway reads which replicas there are when one of them changes its state, and twice a second.
NOTICE_S = 2.0
SHUTDOWN_DRAIN_S = 8.0  # below the grace that `nibble up` and containers give


class ServingSupervisor:
    """The replicas of this worker."""

    def __init__(
        self, context: ServingContext, store: DeploymentStore, registry: WorkerRegistry, record: WorkerRecord
    ) -> None:
        self._context = context
        self._store = store
        self._registry = registry
        self._record = record
        self._owner = f"{record.name}.{uuid4().hex[:8]}"
        self._keepers: dict[tuple[str, int], ReplicaKeeper] = {}
        self._published: dict[tuple[str, int], str] = {}  # the state that was last announced
        self._free_since: dict[Claim, float] = {}
        self._not_before: dict[Claim, float] = {}  # slots whose servers failed here
        self._registered = 0.0
        self._claims_from = 0.0

    def run(self, shutdown: threading.Event) -> None:
        """Serve until `shutdown` is set, then stop every server."""
        self._context.cache.keep_only(self._wanted_artifacts())
        while not shutdown.wait(PASS_S):
            try:
                self.step()
            except (RedisError, NibbleError) as fault:
                log.warning("pass not finished: %s", fault)
                self._claims_from = time.monotonic() + SETTLE_S
        self._end()

    def step(self) -> None:
        """One pass."""
        deployments = {live.id: live for live in self._store.all()}
        self._stop_unwanted(deployments)
        self._claim(deployments)
        for keeper in list(self._keepers.values()):
            self._beat(keeper)
        for live in deployments.values():
            self._promote_if_replaced(live)
            self._unload_if_idle(live)
        self._register()

    def _stop_unwanted(self, deployments: dict[str, LiveDeployment]) -> None:
        for (deployment_id, slot), keeper in list(self._keepers.items()):
            live = deployments.get(deployment_id)
            if live is None or not live.deployment.wants_servers:
                keeper.stop()
            elif placement(live).get(slot) != keeper.replica.generation:
                keeper.stop(notice_s=NOTICE_S)
            if not keeper.is_alive():
                self._release(keeper)

    def _release(self, keeper: ReplicaKeeper) -> None:
        """Record how the replica ended, then free its slot.

        One replica's failure does not fail the deployment while others serve.
        """
        problem, replica = keeper.failure, keeper.replica
        try:
            if problem is not None:
                live = self._store.get(keeper.deployment.tenant, keeper.deployment.id)
                others = [other for other in live.ready if other.slot != replica.slot]
                self._store.update(live.id, lambda each: bereft(each, replica, others, problem))
                self._not_before[*keeper.slot, replica.generation] = time.monotonic() + FAILED_AGAIN_S
        except NotFound:
            log.info("%s: its deployment is gone", keeper.name)
        self._store.release(keeper.replica)
        del self._keepers[keeper.slot]
        self._published.pop(keeper.slot, None)
        if keeper.deployment.spec.artifact not in self._wanted_artifacts():
            self._context.cache.drop(keeper.deployment.spec.artifact)

    def _wanted_artifacts(self) -> set[str]:
        """Of deployments that are not deleted; files of others are kept for as long as a server uses them."""
        deployments = [live.deployment for live in self._store.all()]
        return {
            artifact for each in deployments if each.goal is not Goal.REMOVE for artifact in each.artifacts
        }

    def _claim(self, deployments: dict[str, LiveDeployment]) -> None:
        """Take at most one free slot per pass, so that other workers get some."""
        now, free = time.monotonic(), self._free_slots(deployments)
        self._free_since = {claim: self._free_since.get(claim, now) for claim in free}
        self._not_before = {claim: until for claim, until in self._not_before.items() if now < until}
        if len(self._keepers) >= self._context.settings.serve_slots or now < self._claims_from:
            return
        for claim, since in sorted(self._free_since.items()):
            if now - since < SPREAD_S * len(self._keepers) or now < self._not_before.get(claim, 0.0):
                continue
            deployment_id, slot, generation = claim
            deployment = deployments[deployment_id].deployment.of_generation(generation)
            replica = self._replica(deployment, slot, generation)
            if self._store.beat(replica, ttl_s=REPLICA_TTL_S):
                keeper = ReplicaKeeper(self._context, deployment, replica)
                self._keepers[deployment_id, slot] = keeper
                keeper.start()
                return

    def _free_slots(self, deployments: dict[str, LiveDeployment]) -> list[Claim]:
        return [
            (live.id, slot, generation)
            for live in deployments.values()
            for slot, generation in free_slots(live).items()
            if self._engine(live.deployment.of_generation(generation)) in self._record.engines
            and (live.id, slot) not in self._keepers
        ]

    def _replica(self, deployment: Deployment, slot: int, generation: int) -> Replica:
        return Replica(
            deployment=deployment.id,
            slot=slot,
            generation=generation,
            owner=self._owner,
            worker=self._record.name,
            engine=self._engine(deployment),
            since=datetime.now(UTC),
        )

    def _engine(self, deployment: Deployment) -> str:
        """The engine that serves it here: for `auto` vLLM where it is installed and a GPU is there."""
        if deployment.spec.engine != "auto":
            return deployment.spec.engine
        has_vllm = "vllm" in self._record.engines and self._record.device != "cpu"
        return "vllm" if has_vllm else "transformers"

    def _beat(self, keeper: ReplicaKeeper) -> None:
        replica = keeper.replica
        is_news = self._published.get(keeper.slot) != replica.state
        if not self._store.beat(replica, ttl_s=REPLICA_TTL_S, announce=is_news):
            log.warning("%s: another worker has taken the slot", keeper.name)
            keeper.stop()
            return
        self._published[keeper.slot] = replica.state
        if is_news and replica.is_ready:
            self._store.touch([keeper.deployment])
            load_s = keeper.load_s
            self._store.update(keeper.deployment.id, lambda deployment: loaded(deployment, load_s))

    def _promote_if_replaced(self, live: LiveDeployment) -> None:
        """Record that the replacement serves, once all its servers do."""
        incoming = live.deployment.incoming
        if incoming is not None and is_replaced(live):
            log.info("%s serves %s now", live.spec.name, incoming.served.subject)
            self._store.update(live.id, lambda deployment: promoted(deployment, incoming.generation))

    def _unload_if_idle(self, live: LiveDeployment) -> None:
        """Unload a deployment whose last request is older than its idle timeout."""
        if live.spec.idle_timeout_s is None or live.state is not DeploymentState.READY:
            return
        if not any(replica.owner == self._owner for replica in live.replicas):
            return
        is_idle = all(each.is_ready and each.running + each.waiting == 0 for each in live.replicas)
        if is_idle and not self._store.was_used(live.deployment):
            log.info("deployment %s is idle; its servers stop", live.spec.name)
            self._store.update(live.id, resting)

    def _register(self) -> None:
        if time.monotonic() - self._registered < REGISTRY_S and self._record.servers == len(self._keepers):
            return
        self._registered = time.monotonic()
        memory = device_memory(self._record.device)
        changes = {
            "servers": len(self._keepers),
            "slots": self._context.settings.serve_slots,
            "heartbeat_at": datetime.now(UTC),
            "memory_bytes": memory.used,
            "memory_total": memory.total,
        }
        self._record = self._record.model_copy(update=changes)
        self._registry.beat(self._record, ttl_s=REGISTRY_TTL_S)

    def _end(self) -> None:
        """Stop every server, let short requests finish, and free the slots for other workers."""
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.stop(drain_s=min(SHUTDOWN_DRAIN_S, self._context.settings.drain_s))
        try:
            while any(keeper.is_alive() for keeper in keepers):
                for keeper in keepers:
                    self._beat(keeper)
                time.sleep(POLL_S)
            for keeper in keepers:
                self._store.release(keeper.replica)
            self._registry.remove(self._record.name)
        except (RedisError, NibbleError) as fault:
            log.warning("the slots run out by themselves: %s", fault)
        for keeper in keepers:
            keeper.join()


def engines() -> tuple[str, ...]:
    """The engines that this host can run."""
    return ("transformers", "vllm") if vllm_program() is not None else ("transformers",)


def own_address(setting: str) -> str:
    return socket.gethostbyname(socket.gethostname()) if setting == "auto" else setting


def serve(
    settings: Settings,
    redis_url: str,
    record: WorkerRecord,
    shutdown: threading.Event,
    *,
    server_module: str = SERVER_MODULE,
) -> None:
    """Run servers until `shutdown` is set."""
    redis = connect(redis_url)
    wait_for_redis(redis)
    objects = ObjectStore(settings.object_store_url)
    context = ServingContext(
        settings=settings,
        artifacts=ArtifactStore(objects),
        cache=ArtifactCache(settings.state_dir / "cache" / "artifacts", objects),
        host=own_address(settings.serve_host),
        device=record.device,
        server_module=server_module,
    )
    log.info("worker %s serves on %s with %s", record.name, record.device, ", ".join(record.engines))
    ServingSupervisor(context, DeploymentStore(redis), WorkerRegistry(redis), record).run(shutdown)


def describe(device: str, name: str | None) -> WorkerRecord:
    described = describe_worker(device, name or f"{socket.gethostname()[:32]}-serve-{os.getpid()}")
    return described.model_copy(update={"queue": "serve", "engines": engines()})


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nibble worker --queue serve", description=__doc__)
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--name", type=worker_name, help="how the worker is listed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    settings = Settings()
    set_up_logs(settings)
    shutdown = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shutdown.set())
    with refusals_logged(log):
        make_folder(settings.scratch_dir)
        with resolve_redis(settings) as server:
            serve(settings, server.url, describe(resolve_device(options.device), options.name), shutdown)


if __name__ == "__main__":
    main()
