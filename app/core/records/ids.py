"""Ids: a prefix that names the kind, and a ULID, so that they sort by time."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from ulid import ULID

from app.core.errors import MalformedRequest
from app.core.formats.registry import FormatName

Kind = Literal["job", "art", "dep"]
ULID_PATTERN = r"[0-7][0-9A-HJKMNP-TV-Z]{25}"
JOB_ID_PATTERN = rf"^job_{ULID_PATTERN}$"
ARTIFACT_ID_PATTERN = rf"^art_{ULID_PATTERN}$"
DEPLOYMENT_ID_PATTERN = rf"^dep_{ULID_PATTERN}$"


def new_id(kind: Kind) -> str:
    return f"{kind}_{ULID()}"


def is_id(kind: Kind, value: str) -> bool:
    return re.fullmatch(rf"{kind}_{ULID_PATTERN}", value) is not None


def deployment_id(job_id: str) -> str:
    """The id of the deployment that a job makes: the same on every attempt, so that there is one."""
    return f"dep_{derived(job_id, 'deploy')}"


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
