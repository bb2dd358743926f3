"""Follows a job in the terminal: progress, device, errors of layers and notes as they come."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from app.commands.progress import ProgressView, progress_view
from app.core.child.assignment import PREDICTION
from app.core.errors import NibbleError

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import EventAnswer, JobAnswer, NibbleClient

NEWS_S = 1.0  # events are asked for at most this often
PAGE = 1000


def watch_job(client: NibbleClient, whole: str, console: Console) -> JobAnswer:
    """Show progress until the job has ended; returns the ended job."""
    with progress_view(console) as view:
        news = JobNews(client, whole, view)
        for job in client.follow(whole):
            if job.is_terminal:
                break
            view.count_from(job.started_at or job.created_at)
            # A restarting service is waited for where the job is asked for, not where details are.
            with contextlib.suppress(NibbleError):
                news.tell(job)
            view.show((job.stage if job.state == "running" else None) or job.state, job.progress)
    return job


class JobNews:
    """What a job's record does not say: notes, finished layers, and what device its worker has."""

    def __init__(self, client: NibbleClient, whole: str, view: ProgressView) -> None:
        self._client, self._job, self._view = client, whole, view
        self._after: str | None = None
        self._asked = 0.0
        self._worker: str | None = None

    def tell(self, job: JobAnswer) -> None:
        """Show what is new."""
        if time.monotonic() - self._asked < NEWS_S:
            return
        self._asked = time.monotonic()
        if job.worker is not None and job.worker != self._worker:
            self._worker = job.worker
            self._view.on_device(f"{self._device_of(job.worker)} ({job.worker})")
        has_more = True
        while has_more:
            page = self._client.event_page(self._job, after=self._after, limit=PAGE)
            self._after, has_more = page.next or self._after, page.has_more
            for event in page.items:
                self._show(event)

    def _show(self, event: EventAnswer) -> None:
        payload = event.payload
        if event.kind == "note" and payload.get("code") != PREDICTION and payload.get("message"):
            self._view.note(str(payload["message"]))
        elif event.kind == "checkpoint" and payload.get("error") is not None:
            self._view.layer_done(payload["layer"], payload["error"])

    def _device_of(self, worker: str) -> str:
        for each in self._client.workers().items:
            if each.name == worker:
                return each.device_name or each.device
        return "device unknown"
