"""Takes up pushes that are due and sends them, from a thread of each API process.

The files are streamed from object storage to the hub, a chunk at a time: no process holds an artifact, and no
disk has a second copy. Workers don't push: a GPU would wait for a network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, Self

import httpx
from pydantic import ValidationError
from redis.exceptions import RedisError

from app.core.access.hub_tokens import HubTokens
from app.core.errors import InvalidRequest, NibbleError, NotFound, Unavailable
from app.core.outgoing.webhook_messages import Delivery, delivery
from app.core.pushes.hub_repository import HubRepository, PushedCommit, PushedFile
from app.core.pushes.model_card import SourceCard, model_card, source_repository
from app.core.pushes.push_store import PushStore
from app.core.records.artifact import ArtifactFile, ArtifactManifest
from app.core.records.job import Job, Problem
from app.core.records.push import Push, PushState
from app.core.settings import Settings
from app.core.sources.hub_model import hub_client, limited_body, refuse_offline
from app.core.storage.artifact_store import ArtifactStore, file_key
from app.core.storage.object_store import ObjectStore
from app.core.storage.storage_keys import report_key

log = logging.getLogger(__name__)

CARD = "README.md"
HOLD_S = 60.0  # without a report for so long, the push is taken up again
REPORT_S = 2.0
# Seconds after each fault of hub or storage; after the last one the push counts as failed.
DELAYS_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0)
MOST_ATTEMPTS = 50  # of processes that died over it

OnBytes = Callable[[int], None]


class JobHistory(Protocol):
    """What pushes need of the store of jobs."""

    def load(self, job_id: str) -> Job: ...

    def append_event(self, job_id: str, kind: str, payload: dict[str, Any]) -> str: ...


class PushLeft(Exception):
    """This process ends, or another attempt has the push: it goes on elsewhere."""


class StoredFile:
    """A file of an artifact, read from object storage; `on_bytes` gets each chunk and may raise to stop.

    Bytes that are not the manifest's never complete an upload: its last chunk is sent once all are hashed.
    """

    def __init__(self, objects: ObjectStore, key: str, file: ArtifactFile, on_bytes: OnBytes) -> None:
        self.path, self.size, self.sha256 = file.path, file.size, file.sha256
        self._objects, self._key, self._on_bytes = objects, key, on_bytes
        self._digests = {0: hashlib.sha256()}  # of all bytes before a position

    def read(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        content = self._objects.read_range(self._key, start, end)
        if (start, end) == (0, self.size):
            self._check(hashlib.sha256(content).hexdigest())
        return content

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        before = self._digests.get(start)
        digest = None if before is None else before.copy()
        held = b""
        for chunk in self._objects.stream(self._key, start, end):
            if held:
                yield held
            if digest is not None:
                digest.update(chunk)
            self._on_bytes(len(chunk))
            held = chunk
        if digest is not None:
            if end == self.size:
                self._check(digest.hexdigest())
            assert before is not None
            self._digests = {start: before, end: digest}
        yield held

    def _check(self, digest: str) -> None:
        if digest != self.sha256:
            raise InvalidRequest(
                f"the stored {self.path} has SHA-256 {digest}, its manifest says {self.sha256}",
                code="storage_corrupt",
                remedy="restore the object, or create the artifact again with `force`",
            )


class WrittenFile:
    """A file that the push writes itself."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path, self._content = path, content
        self.size, self.sha256 = len(content), hashlib.sha256(content).hexdigest()

    def read(self, start: int, end: int) -> bytes:
        return self._content[start:end]

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        yield self.read(start, end)


@dataclass(frozen=True)
class Pusher:
    """Sends one push at a time."""

    pushes: PushStore
    tokens: HubTokens
    jobs: JobHistory
    objects: ObjectStore
    settings: Settings
    delays_s: Sequence[float] = DELAYS_S
    hold_s: float = HOLD_S
    stopping: threading.Event = field(default_factory=threading.Event)

    def push_due(self) -> bool:
        """Take up one push; False if none is due."""
        if self.stopping.is_set():
            return False
        push = self.pushes.take(hold_s=self.hold_s)
        if push is None:
            return False
        log.info("push %s of %s to %s begins", push.id, push.artifact, push.options.repo_id)
        try:
            self._end(push, self._sent(push))
        except PushLeft:
            # At once for another process; a stale attempt changes nothing.
            self._write(push.model_copy(update={"state": PushState.PENDING}), again_in_s=0.0)
        except (NibbleError, httpx.HTTPError, httpx.InvalidURL) as fault:
            self._after(push, fault)
        return True

    def _sent(self, push: Push) -> PushedCommit:
        if push.attempt > MOST_ATTEMPTS:
            raise InvalidRequest(
                f"{push.attempt - 1} attempts have died over it",
                code="push_lost",
                remedy="read the API's log",
            )
        manifest = ArtifactStore(self.objects).get(push.tenant, push.artifact)
        refuse_offline(push.options.repo_id)
        token = self.tokens.of(push.id) if push.has_hub_token else self.settings.hub_token
        with ExitStack() as stack:
            client = stack.enter_context(hub_client(self.settings.outgoing_networks, token))
            repository = HubRepository(push.options, client)
            repository.prepare()
            progress = stack.enter_context(PushProgress(self, push))
            files: list[PushedFile] = [
                StoredFile(self.objects, file_key(manifest, file.path), file, progress.add)
                for file in manifest.files
                if file.path != CARD
            ]
            card = model_card(
                manifest, self._report(manifest), source_card(client, manifest), push.options.repo_id
            )
            return repository.push([WrittenFile(CARD, card.encode()), *files], message_of(push, manifest))

    def _report(self, manifest: ArtifactManifest) -> dict[str, Any] | None:
        try:
            report: dict[str, Any] = json.loads(self.objects.get(report_key(manifest.job)))
        except (NotFound, ValueError):  # deleted with its job; the card says so
            return None
        return report

    def _end(self, push: Push, committed: PushedCommit) -> None:
        changes = {"url": committed.url.partition("/commit/")[0], "commit": committed.commit}
        self._finish(push, PushState.PUSHED, commit_url=committed.url, **changes)

    def _after(self, push: Push, fault: NibbleError | httpx.HTTPError | httpx.InvalidURL) -> None:
        """Wait before the next attempt, or end as failed."""
        problem = (
            Problem.of(fault)
            if isinstance(fault, NibbleError)
            else Problem(code="hub_unavailable", message=f"the hub does not answer: {type(fault).__name__}")
        )
        passes = not isinstance(fault, NibbleError) or isinstance(fault, Unavailable)
        if not passes or push.faults >= len(self.delays_s):
            self._finish(push, PushState.FAILED, error=problem)
            return
        log.warning("push %s waits: %s", push.id, problem.message)
        waiting = {"state": PushState.PENDING, "error": problem, "faults": push.faults + 1}
        self._write(push.model_copy(update=waiting), again_in_s=self.delays_s[push.faults])

    def _finish(self, push: Push, state: PushState, **changes: object) -> None:
        done = push.model_copy(update={"state": state, "finished_at": datetime.now(UTC), **changes})
        if self._write(done, again_in_s=None, message=self._message(done)):
            self.tokens.forget(push.id)
            self._tell(done)
            log.info("push %s: %s", push.id, done.error.message if done.error else done.commit_url)

    def _write(self, push: Push, *, again_in_s: float | None, message: Delivery | None = None) -> bool:
        return self.pushes.write(push, attempt=push.attempt, again_in_s=again_in_s, message=message)

    def _message(self, push: Push) -> Delivery | None:
        """The webhook of the artifact's job, if it asks for this event."""
        kind = "artifact.pushed" if push.state is PushState.PUSHED else "artifact.push_failed"
        try:
            job = self.jobs.load(push.job)
        except NibbleError:  # deleted, or of another version
            return None
        if job.spec.webhook is None or kind not in job.spec.webhook.events:
            return None
        return delivery(job, job.spec.webhook.url, kind, push_fields(push))

    def _tell(self, push: Push) -> None:
        """An event in the history of the artifact's job, if that is still there."""
        try:
            self.jobs.append_event(push.job, "push", push_fields(push))
        except NibbleError as fault:
            log.info("no event of push %s: %s", push.id, fault.message)


class PushProgress:
    """What a push has sent, written now and then by a thread of its own; each write renews the hold.

    Not by the thread that sends: it may wait longer for the hub's answer than the hold lasts.
    """

    def __init__(self, pusher: Pusher, push: Push) -> None:
        self._pusher, self._push = pusher, push
        self._sent, self._written = 0, 0
        self._over, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._report, name="push-progress", daemon=True)

    def add(self, size: int) -> None:
        """Raises PushLeft if this process ends, or the push is another attempt's by now."""
        if self._pusher.stopping.is_set() or self._lost.is_set():
            raise PushLeft
        self._sent += size

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._over.set()
        self._thread.join()

    def _report(self) -> None:
        pusher, renewed = self._pusher, time.monotonic()
        while not self._over.wait(min(REPORT_S, pusher.hold_s / 4)):
            if self._sent == self._written and time.monotonic() - renewed < pusher.hold_s / 4:
                continue
            self._written, renewed = self._sent, time.monotonic()
            so_far = self._push.model_copy(update={"sent_bytes": self._written})
            try:
                is_ours = pusher.pushes.write(so_far, attempt=self._push.attempt, again_in_s=pusher.hold_s)
            except RedisError as fault:  # the next write says whose it is
                log.warning("push %s goes on without redis: %s", self._push.id, fault)
                continue
            if not is_ours:
                self._lost.set()
                return


def push_fields(push: Push) -> dict[str, Any]:
    """The fields of a push in events and messages; the API has the rest."""
    fields = push.model_dump(
        mode="json", include={"id", "artifact", "state", "commit", "commit_url", "error"}
    )
    return {**fields, "repo_id": push.options.repo_id}


def message_of(push: Push, manifest: ArtifactManifest) -> str:
    default = f"{manifest.recipe.label} in {manifest.format}, by Nibble"
    return push.options.commit_message or default


def source_card(client: httpx.Client, manifest: ArtifactManifest) -> SourceCard:
    """The card of the source on the hub; an empty one if there is none, or it can't be read."""
    from huggingface_hub.constants import ENDPOINT

    repository = source_repository(manifest.model)
    if repository is None:
        return SourceCard()
    try:
        with client.stream("GET", f"{ENDPOINT}/api/models/{repository}") as answer:
            body = limited_body(answer) if answer.is_success else b"{}"
        card = json.loads(body).get("cardData") or {}
        return SourceCard.model_validate(card)
    except (httpx.HTTPError, NibbleError, ValueError, ValidationError, AttributeError) as fault:
        log.info("no card of %s: %s", repository, type(fault).__name__)
        return SourceCard()
