"""A text dataset outside the request: one file on the hub, in S3 or on this host.

hf:org/name/folder/file.jsonl@revision    a file of a dataset repository on the hub
s3://bucket/prefix/file.jsonl             an object
file:///folder/file.jsonl                 a file under one of NIBBLE_MODEL_ROOTS
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import SecretStr

from app.core.errors import ModelRefused, TextRefused
from app.core.outgoing.address_guard import IpNetwork
from app.core.records.specs import OWN_ANSWERS
from app.core.sources.model_reference import parse_model_reference
from app.core.sources.model_source import HubModel, LocalModel, ModelFiles, S3Model
from app.core.sources.text_content import (
    CONVERT_REMEDY,
    HEAD_BYTES,
    MAX_TEXT_BYTES,
    READ_ENDINGS,
    check_head,
    text_suffix,
)
from app.core.storage.object_store import open_bucket

BUNDLED = "builtin:"
HERE = ("inline", OWN_ANSWERS)
# Refusals of a model's files that say the same of a text's, with the right remedy.
SAID = frozenset(
    {"hub_offline", "model_forbidden", "model_gated", "model_path_forbidden", "model_unreadable"}
)
FORMS = (
    "write builtin:wikitext2, self, hf:org/name/file.jsonl@revision, s3://bucket/file.jsonl, "
    "file:///folder/file.jsonl or upload:<id of a dataset of yours>, or put the texts into the request"
)


class TextFile:
    """A located file: `path` within `files`."""

    def __init__(self, files: ModelFiles, path: str, size: int) -> None:
        self.files = files
        self.path = path
        self.size = size
        self.suffix = text_suffix(path) or ""  # decides how the file is read, so copies have it, too


def is_remote(source: str) -> bool:
    """Whether the text must be fetched: it is neither bundled, nor in the request, nor the model's own."""
    return source not in HERE and not source.startswith(BUNDLED)


def open_text(
    reference: str,
    *,
    model_roots: Sequence[Path],
    networks: Sequence[IpNetwork] = (),
    hub_token: SecretStr | None = None,
) -> TextFile:
    """The file behind a dataset reference.

    Raises TextRefused if it does not exist, is too large or may not be read.
    """
    if text_suffix(reference.partition("@")[0]) is None:
        raise refuse_text(reference, f"the file's name must end in one of {READ_ENDINGS}", CONVERT_REMEDY)
    try:
        files, path = locate(reference, model_roots, networks, hub_token)
        size = files.list().get(path)
    except ModelRefused as fault:
        raise refuse_text(reference, fault.message, fault.remedy if fault.code in SAID else FORMS) from fault
    if size is None:
        raise refuse_text(reference, "the file does not exist")
    if size == 0:
        raise refuse_text(reference, "the file is empty")
    if size > MAX_TEXT_BYTES:
        raise refuse_text(reference, f"{size} bytes; at most {MAX_TEXT_BYTES} are allowed")
    return TextFile(files, path, size)


def check_text(text: TextFile) -> None:
    """Refuse a file that can't be read, as far as its beginning shows. Raises TextRefused."""
    head = text.files.read(text.path, 0, min(text.size, HEAD_BYTES))
    check_head(PurePosixPath(text.path).name, head, is_whole=text.size <= HEAD_BYTES)


def locate(
    reference: str,
    model_roots: Sequence[Path],
    networks: Sequence[IpNetwork],
    hub_token: SecretStr | None,
) -> tuple[ModelFiles, str]:
    scheme, _, rest = reference.partition(":")
    if scheme == "hf":
        path, separator, revision = rest.partition("@")
        parts = PurePosixPath(path).parts
        repository = "/".join(parts[:2]) + separator + revision
        parsed = parse_model_reference(f"hf:{repository}")
        files = HubModel(parsed.path, parsed.revision, kind="dataset", networks=networks, token=hub_token)
        return files, "/".join(parts[2:])
    parsed = parse_model_reference(reference)
    file = PurePosixPath(parsed.path)
    if parsed.scheme == "s3":
        store = open_bucket(parsed.bucket or "", prefix=str(file.parent).removeprefix("."))
        return S3Model(f"s3://{parsed.bucket}/{file.parent}", store, only=file.name), file.name
    if parsed.scheme == "file":
        return LocalModel(Path(file.parent), model_roots, only=file.name), file.name
    raise refuse_text(reference, "the scheme is not known")


def refuse_text(reference: str, why: str, remedy: str = FORMS) -> TextRefused:
    return TextRefused(f"dataset {reference[:200]!r}: {why}", code="text_source_invalid", remedy=remedy)
