"""Parse and check the reference of a model or text in a request, without accessing it.

hf:org/name@revision    the hub; a bare `org/name` means the same
s3://bucket/prefix      an S3-compatible store
file:///folder          a folder under one of NIBBLE_MODEL_ROOTS
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from app.core.errors import ModelRefused
from app.core.records.specs import Frozen

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96}){0,4}", re.ASCII)
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
KEY_PART = re.compile(r"[A-Za-z0-9_][\w.=+@ -]{0,254}", re.ASCII)
FORMS = "hf:org/name@revision, s3://bucket/prefix or file:///folder"


class ModelReference(Frozen):
    """A checked reference. `path` is the hub id, the key prefix or the absolute folder."""

    scheme: Literal["hf", "s3", "file"]
    path: str
    bucket: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        if self.scheme == "hf":
            return f"hf:{self.path}" + (f"@{self.revision}" if self.revision else "")
        return f"{self.scheme}://{self.bucket or ''}{'/' if self.bucket else ''}{self.path}"


def refuse_reference(reference: str, why: str) -> ModelRefused:
    return ModelRefused(
        f"model reference {reference[:200]!r}: {why}",
        code="model_reference_invalid",
        remedy=f"write {FORMS}",
        param="model",
    )


def parse_model_reference(reference: str) -> ModelReference:
    """The parts of a reference.

    Raises ModelRefused for path parts, odd characters and unknown schemes.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in reference):
        raise refuse_reference(reference, "control characters are not allowed")
    scheme, separator, rest = reference.partition(":")
    if not separator:
        return parse_hub(reference, reference)
    if scheme == "hf":
        return parse_hub(reference, rest)
    if scheme == "s3" and rest.startswith("//"):
        return parse_s3(reference)
    if scheme == "file" and rest.startswith("//"):
        return parse_file(reference)
    raise refuse_reference(reference, "the scheme is not known")


def parse_hub(reference: str, rest: str) -> ModelReference:
    repository, separator, revision = rest.partition("@")
    if not HUB_ID.fullmatch(repository) or ".." in repository:
        raise refuse_reference(reference, f"{repository[:200]!r} is not a model id")
    if separator and (not REVISION.fullmatch(revision) or ".." in revision):
        raise refuse_reference(reference, f"{revision[:200]!r} is not a revision")
    return ModelReference(scheme="hf", path=repository, revision=revision or None)


def parse_s3(reference: str) -> ModelReference:
    bucket, _, prefix = reference.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/")
    if not BUCKET.fullmatch(bucket) or ".." in bucket:
        raise refuse_reference(reference, f"{bucket[:200]!r} is not a bucket name")
    for segment in prefix.split("/"):
        if not KEY_PART.fullmatch(segment):
            raise refuse_reference(reference, f"the prefix has the unsafe part {segment[:200]!r}")
    return ModelReference(scheme="s3", path=prefix, bucket=bucket)


def parse_file(reference: str) -> ModelReference:
    try:
        url = urlsplit(reference)
    except ValueError as fault:
        raise refuse_reference(reference, str(fault)) from fault
    path = unquote(url.path)
    if url.netloc or url.query or url.fragment or not path.startswith("/"):
        raise refuse_reference(reference, "only file:///absolute/folder is allowed")
    if "\0" in path or ".." in PurePosixPath(path).parts:
        raise refuse_reference(reference, "the path must not hold `..`")
    return ModelReference(scheme="file", path=str(PurePosixPath(path)))
