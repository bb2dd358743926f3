"""Ids: a prefix that names the kind, and a ULID, so that they sort by time."""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from typing import Literal

from ulid import ULID

from app.core.errors import MalformedRequest
from app.core.formats.registry import FormatName

Kind = Literal["job", "art", "dep", "push", "ds", "msg"]
ULID_PATTERN = r"[0-7][0-9A-HJKMNP-TV-Z]{25}"
JOB_ID_PATTERN = rf"^job_{ULID_PATTERN}$"
ARTIFACT_ID_PATTERN = rf"^art_{ULID_PATTERN}$"
DEPLOYMENT_ID_PATTERN = rf"^dep_{ULID_PATTERN}$"
DATASET_ID_PATTERN = rf"^ds_{ULID_PATTERN}$"
DELIVERY_ID_PATTERN = rf"^msg_{ULID_PATTERN}$"


def new_id(kind: Kind) -> str:
    return f"{kind}_{ULID()}"


def is_id(kind: Kind, value: str) -> bool:
    return re.fullmatch(rf"{kind}_{ULID_PATTERN}", value) is not None


def created_at(value: str) -> datetime:
    """The time that is in an id."""
    return ULID.from_str(value.partition("_")[2]).datetime


def first_id(kind: Kind, moment: datetime) -> str:
    """No id of this kind that was made at `moment` or later comes before it."""
    milliseconds = max(0, int(moment.timestamp() * 1000))  # ids begin in 1970
    return f"{kind}_{ULID(milliseconds.to_bytes(6, 'big') + bytes(10))}"


def deployment_id(job_id: str) -> str:
    """The id of the deployment that a job makes: the same on every attempt, so that there is one."""
    return f"dep_{derived(job_id, 'deploy')}"


def push_id(job_id: str) -> str:
    """The id of the push that a job asks for: the same on every attempt, so that there is one."""
    return f"push_{derived(job_id, 'push')}"


def artifact_id(job_id: str, recipe_index: int, format_name: FormatName) -> str:
    """The id of one output of a job: the same on every attempt, so that attempts meet at one manifest."""
    return f"art_{derived(job_id, f'{recipe_index}/{format_name}')}"


def derived(job_id: str, what: str) -> ULID:
    """A ULID with the job's time, and a digest of job and `what` in place of the random part."""
    job = ULID.from_str(job_id.removeprefix("job_"))
    digest = hashlib.sha256(f"{job_id}/{what}".encode()).digest()
    return ULID(job.bytes[:6] + digest[:10])


def check_cursor(kind: Kind, after: str | None) -> None:
    """Raise MalformedRequest for a cursor that is not the id of an item of its list."""
    if after is not None and not is_id(kind, after):
        raise MalformedRequest(
            f"{after[:64]!r} is not a cursor",
            code="invalid_cursor",
            remedy="pass the `next` of the page before",
            param="after",
        )
