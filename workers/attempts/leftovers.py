"""The work folders of attempts that were killed: nobody but the host's workers can remove them."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from redis.exceptions import RedisError

from app.core.errors import NotFound, RecordUnreadable
from app.core.jobs.job_store import JobStore
from app.core.records.job_changes import is_executing

log = logging.getLogger(__name__)

WORK_FOLDER = re.compile(r"(job_[0-9A-Z]{26})-(\d+)")


class Leftovers:
    """Work folders of dead attempts in a host's scratch folder."""

    def __init__(self, folder: Path, store: JobStore) -> None:
        self._folder = folder
        self._store = store

    def remove(self) -> None:
        """Remove the work folders of attempts that are over; without Redis, leave that for later."""
        try:
            dead = self._dead()
        except RedisError as fault:
            log.warning("leftovers stay until redis answers: %s", fault)
            return
        for path in dead:
            shutil.rmtree(path, ignore_errors=True)
            log.info("removed what a dead attempt left: %s", path.name)

    def _dead(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        folders = [(path, WORK_FOLDER.fullmatch(path.name)) for path in sorted(self._folder.iterdir())]
        return [
            path for path, match in folders if match is not None and not self._lives(match[1], int(match[2]))
        ]

    def _lives(self, job_id: str, attempt: int) -> bool:
        """Not by the lease alone: an attempt that was killed holds it until it expires."""
        if not self._store.holds(job_id, attempt):
            return False
        try:
            job = self._store.load(job_id)
        except NotFound:
            return False
        except RecordUnreadable:  # its worker is of another version
            return True
        return job.attempt < attempt or is_executing(job, attempt)
