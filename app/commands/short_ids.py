"""Ids as people type them: whole, the first characters that only one has, or `last`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from app.core.errors import InvalidRequest, NotFound
from app.core.records.ids import ULID_PATTERN

if TYPE_CHECKING:
    from app.client import DeploymentAnswer, NibbleClient

LAST = "last"
SEARCHED = 1000  # newest ids among which a beginning is looked for
SHOWN = 6  # of those that begin alike
WHOLE = re.compile(rf"(job|art|dep|push|msg|ds)_{ULID_PATTERN}")
AS_ID = "an id, the start of one, or `last`"

# How the first of each kind comes about.
FIRST = {
    "job": "`nibble submit MODEL` creates a job",
    "artifact": "a job publishes artifacts when it succeeds: `nibble submit MODEL` creates one",
    "dataset": "`nibble datasets upload FILE` stores one",
    "deployment": "`nibble deploy ARTIFACT --name NAME` creates one",
    "key": "`nibble keys create --scopes jobs:read,jobs:write` creates one",
    "webhook": "`nibble submit MODEL --webhook URL` asks for them",
}

JobId = Annotated[str, typer.Argument(metavar="JOB", help=f"A job: {AS_ID}.")]
ArtifactId = Annotated[str, typer.Argument(metavar="ARTIFACT", help=f"An artifact: {AS_ID}.")]


def job_id(client: NibbleClient, written: str) -> str:
    return whole_id(written, "job", lambda: (job.id for job in client.each_job()))


def artifact_id(client: NibbleClient, written: str) -> str:
    """Also `model@tag` is taken, which the service resolves."""
    if "@" in written:
        return written
    return whole_id(written, "artifact", lambda: (artifact.id for artifact in client.each_artifact()))


def key_id(client: NibbleClient, written: str) -> str:
    """Of keys `last` is the newest, too; the list is the oldest first."""
    return whole_id(written, "key", lambda: (key.id for key in reversed(client.keys().items)))


def delivery_id(client: NibbleClient, job: str, written: str) -> str:
    listed = client.webhook_deliveries(job)
    return whole_id(written, "webhook", lambda: (delivery.id for delivery in reversed(listed.items)))


def deployment_of(client: NibbleClient, written: str) -> DeploymentAnswer:
    """The deployment of a name, an id, the start of an id, or the newest one."""
    if written != LAST and not written.startswith("dep_"):
        return client.deployment_named(written)
    newest = (each.id for each in client.each_deployment() if each.state != "draining")
    return client.deployment_named(whole_id(written, "deployment", lambda: newest))


def require_own(names: Iterable[str], own: Iterable[str], noun: str, owner: str) -> None:
    """Raises NotFound for a name to take away that the owner does not have: most likely a slip."""
    present = sorted(own)
    absent = [name for name in names if name not in present]
    if absent:
        raise NotFound(
            f"{owner} has no {noun} {', '.join(absent)}",
            code="name_not_found",
            remedy=f"remove one of: {', '.join(present)}" if present else f"nothing: it has no {noun}",
        )


def whole_id(written: str, noun: str, newest_first: Callable[[], Iterable[str]]) -> str:
    """The id that is meant; as written if none begins so, for the service to refuse.

    Raises NotFound for `last` of nothing, InvalidRequest if several ids begin so.
    """
    if WHOLE.fullmatch(written):
        return written
    if written == LAST:
        newest = next(iter(newest_first()), None)
        if newest is None:
            raise NotFound(
                f"there is no {noun} yet",
                code=f"{noun}_not_found",
                remedy=FIRST.get(noun, ""),
            )
        return newest
    try:
        alike = [each for each in islice(newest_first(), SEARCHED) if begins(each, written)]
    except NotFound:
        alike = []
    if written in alike or not alike:
        return written
    if len(alike) > 1:
        more = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
        raise InvalidRequest(
            f"{len(alike)} {noun}s begin with {written}: {', '.join(alike[:SHOWN])}{more}",
            code="id_ambiguous",
            remedy="type more characters, or `last` for the newest",
        )
    return alike[0]


def begins(whole: str, written: str) -> bool:
    """Whether the id, or what follows its kind, begins so; in any case of letters."""
    folded = written.upper()
    return bool(folded) and (
        whole.upper().startswith(folded) or whole.partition("_")[2].upper().startswith(folded)
    )
