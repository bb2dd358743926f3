"""Why a deployment is in its state, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from app.core.deployments.deployment import Goal, LiveDeployment, Replica
from app.core.deployments.placement import free_slots, placement, ready_count
from app.core.records.counted import counted


class ServingWorker(NamedTuple):
    """A live worker of the queue `serve`."""

    engines: tuple[str, ...]
    servers: int  # that it runs
    slots: int  # how many it may run; 0: not known


def reason(live: LiveDeployment, workers: Sequence[ServingWorker]) -> str:
    """The reason of its state; empty if all is well. `workers` are all that serve."""
    deployment, spec = live.deployment, live.spec
    if deployment.goal is Goal.REMOVE:
        return "deleted; running requests are finished"
    if deployment.goal is Goal.PAUSE:
        return "paused by its owner; `nibble deployments resume` starts it again"
    if deployment.error is not None:
        return deployment.error.message
    if deployment.goal is Goal.REST:
        return f"no request for {spec.idle_timeout_s} s; the next one starts it again"
    return "; ".join([*unready(live, workers), *replacing(live)])


def unready(live: LiveDeployment, workers: Sequence[ServingWorker]) -> Iterator[str]:
    """What its servers wait for."""
    for replica in live.replicas:
        if not replica.is_ready:
            yield f"replica {replica.slot}: {said(replica)}"
    absent = len(free_slots(live))
    if absent:
        count = len(placement(live))
        yield f"{absent} of {count} replicas wait: {waits_for(live.spec.engine, workers)}"
        if live.deployment.setback:
            yield f"the last one that was tried failed: {live.deployment.setback}"


def replacing(live: LiveDeployment) -> Iterator[str]:
    """How far its replacement is."""
    replacement = live.deployment.replacement
    if replacement is None:
        return
    names = f"the replacement by {replacement.served.subject} (generation {replacement.generation})"
    if replacement.error is not None:
        yield f"{names} failed: {replacement.error.message}; what served before goes on"
    else:
        ready = ready_count(live, replacement.generation)
        yield f"{names} is under way: {ready} of {live.spec.replicas} servers ready"


def said(replica: Replica) -> str:
    return f"{replica.state}, {replica.note}" if replica.note else str(replica.state)


def waits_for(engine: str, workers: Sequence[ServingWorker]) -> str:
    if not workers:
        return "no worker takes the queue `serve`"
    able = [worker for worker in workers if engine in ("auto", *worker.engines)]
    if not able:
        return f"no worker has {engine} installed"
    if any(worker.servers < worker.slots or not worker.slots for worker in able):
        return "for a worker with a free slot"
    slots = counted(sum(worker.slots for worker in able), "slot")
    return (
        f"none of {slots} is free ({counted(len(able), 'worker')}); NIBBLE_SERVE_SLOTS gives a worker more, "
        "and so does another worker with --queue serve"
    )
