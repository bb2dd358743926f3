"""Which generation each slot of a deployment serves: the one rule by which replicas start and end.

A replica whose slot has another generation, or none, finishes what it has begun and ends. So scaling, pausing
and replacing are changes of the record alone, and any worker may carry them out.
"""

from __future__ import annotations

from app.core.deployments.deployment import LiveDeployment, ReplicaState, side_slots

SURGE = 1  # servers of a replacement that start at a time, beyond the replicas that are asked for


def placement(live: LiveDeployment) -> dict[int, int]:
    """The generation of each slot that shall be served.

    While a replacement is under way, one of its servers after another starts; each that is ready lets one of
    the present generation end. At no time are fewer ready than before.
    """
    deployment, incoming = live.deployment, live.deployment.incoming
    if not deployment.wants_servers:
        return {}
    count, generation = live.spec.replicas, deployment.generation
    present = side_slots(deployment.side, count)
    if incoming is None:
        return dict.fromkeys(present, generation)
    coming = ranked(live, side_slots(1 - deployment.side, count), incoming.generation)
    begun = sum(live_rank(live, slot, incoming.generation) < ABSENT for slot in coming)
    ready = ready_count(live, incoming.generation)
    chosen = dict.fromkeys(ranked(live, present, generation)[: max(0, count - ready)], generation)
    chosen |= dict.fromkeys(coming[: max(begun, ready + SURGE)], incoming.generation)
    return chosen


def free_slots(live: LiveDeployment) -> dict[int, int]:
    """The slots that a worker may take, with their generations."""
    held = {replica.slot for replica in live.replicas}
    return {slot: generation for slot, generation in placement(live).items() if slot not in held}


def is_replaced(live: LiveDeployment) -> bool:
    """Whether every server of the replacement is ready."""
    incoming = live.deployment.incoming
    return (
        incoming is not None
        and live.deployment.wants_servers
        and ready_count(live, incoming.generation) == live.spec.replicas
    )


def ready_count(live: LiveDeployment, generation: int) -> int:
    """How many servers of that generation answer, of the replicas that are asked for."""
    return min(live.spec.replicas, sum(replica.generation == generation for replica in live.ready))


READY, BEGUN, ABSENT = range(3)


def live_rank(live: LiveDeployment, slot: int, generation: int) -> int:
    """How far the slot's replica is; one that ends counts as absent."""
    for replica in live.replicas:
        if (replica.slot, replica.generation) == (slot, generation):
            if replica.is_ready:
                return READY
            return ABSENT if replica.state is ReplicaState.DRAINING else BEGUN
    return ABSENT


def ranked(live: LiveDeployment, slots: range, generation: int) -> list[int]:
    """The slots, those first whose replicas are farthest."""
    return sorted(slots, key=lambda slot: (live_rank(live, slot, generation), slot))
