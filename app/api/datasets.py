"""`/v1/datasets`: texts of a tenant's own, uploaded for calibration and evaluation."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from app.api.dependencies import JobsReader, JobsWriter, ServicesParam
from app.api.middleware import BODY_LIMIT_S, too_slow
from app.api.paging import PageQuery
from app.api.services import Services
from app.core.access.api_keys import Principal
from app.core.errors import BodyTooLarge, Conflict, InvalidRequest, NibbleError, QuotaExceeded, TextRefused
from app.core.records.dataset import DatasetManifest, TextPreview
from app.core.records.ids import new_id
from app.core.sources.text_content import (
    CONVERT_REMEDY,
    HEAD_BYTES,
    MAX_TEXT_BYTES,
    READ_ENDINGS,
    check_head,
    text_suffix,
)
from app.core.sources.text_preview import PREVIEW_BYTES, preview_of
from app.core.storage.storage_keys import dataset_content_key, dataset_folder

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

NAME = re.compile(r"[\w][\w .+=@()-]{0,199}")
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class DatasetView(BaseModel):
    object: Literal["dataset"] = "dataset"
    id: str
    name: str
    created_at: datetime
    size: int
    sha256: str
    reference: str = Field(description="What `dataset` of a job's calibration or evaluation names it by.")
    documents: int | None = Field(description="Null: the beginning of the file does not tell.")
    conversations: int | None = Field(description="Documents that go through the model's chat template.")
    tokens: int | None = Field(description="Roughly: a quarter of the text's bytes.")
    sequence_length: int
    windows: int | None = Field(description="About how many of `sequence_length` tokens the text gives.")
    is_estimate: bool = Field(description="The counts are from the beginning of the file alone.")
    first: tuple[str, ...] = Field(description="How the first documents begin.")
    links: dict[str, str]

    @classmethod
    def of(cls, manifest: DatasetManifest, sequence_length: int) -> Self:
        preview = manifest.preview
        return cls(
            **manifest.model_dump(include={"id", "name", "created_at", "size", "sha256"}),
            **preview.model_dump(include={"documents", "conversations", "is_estimate", "first"}),
            reference=manifest.reference,
            tokens=preview.windows(1),
            sequence_length=sequence_length,
            windows=preview.windows(sequence_length),
            links={"self": f"/v1/datasets/{manifest.id}"},
        )


class DatasetList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[DatasetView, ...]
    has_more: bool
    next: str | None


SequenceLength = Annotated[
    int, Field(ge=8, le=131072, description="Tokens of a window, for the number of windows.")
]


class UploadQuery(BaseModel):
    """What is said of a file beside its content."""

    name: str = Field(
        max_length=200, description="Of the file; its end says how it is read: .jsonl, .csv, .txt, …, .gz."
    )
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Of the file: another one is refused."
    )
    sequence_length: SequenceLength = 512


@router.post("", status_code=201, openapi_extra=BODY)
async def upload_dataset(
    request: Request,
    services: ServicesParam,
    principal: JobsWriter,
    query: Annotated[UploadQuery, Query()],
) -> DatasetView:
    """Store a text file: the body is the file itself. It is checked as a job would read it."""
    check_name(query.name)
    require_bare_file(request)
    most, too_large = await run_in_threadpool(room_for, services, principal)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_large
    upload = Upload(request, query.name, most, too_large)
    dataset_id = new_id("ds")
    try:
        preview = await upload.stored(services, dataset_id, query.sha256)
        manifest = DatasetManifest(
            id=dataset_id, tenant=principal.tenant, created_at=datetime.now(UTC), name=query.name,
            size=upload.size, sha256=upload.digest.hexdigest(), preview=preview,
        )  # fmt: skip
        await run_in_threadpool(services.datasets.create, services.limits, manifest)
    except BaseException:
        # Also if the caller went: nothing of a file that does not exist is left.
        await asyncio.shield(run_in_threadpool(services.objects.delete_prefix, dataset_folder(dataset_id)))
        raise
    request.state.audit_detail = f"{dataset_id}: {query.name}, {upload.size} bytes"
    return DatasetView.of(manifest, query.sequence_length)


class DatasetQuery(PageQuery):
    sequence_length: SequenceLength = 512


@router.get("")
def list_datasets(
    services: ServicesParam, principal: JobsReader, query: Annotated[DatasetQuery, Query()]
) -> DatasetList:
    """The tenant's datasets, newest first."""
    page = services.datasets.page(principal.tenant, limit=query.limit, after=query.after)
    views = tuple(DatasetView.of(manifest, query.sequence_length) for manifest in page.manifests)
    return DatasetList(data=views, has_more=page.has_more, next=views[-1].id if page.has_more else None)


@router.get("/{dataset_id}")
def read_dataset(
    dataset_id: str, services: ServicesParam, principal: JobsReader, sequence_length: SequenceLength = 512
) -> DatasetView:
    """A dataset: what was read of it, and about how many windows it gives."""
    return DatasetView.of(services.datasets.get(principal.tenant, dataset_id), sequence_length)


@router.delete("/{dataset_id}", status_code=204, response_class=Response)
def delete_dataset(dataset_id: str, services: ServicesParam, principal: JobsWriter) -> None:
    """Remove a dataset and its file, unless a job that has not ended reads it."""
    manifest = services.datasets.get(principal.tenant, dataset_id)
    services.datasets.hide(manifest)  # before jobs are looked at: no further one can name it
    try:
        require_no_reader(services, manifest)
    except NibbleError:
        services.datasets.show(manifest)
        raise
    services.datasets.discard(services.limits, manifest)


def require_no_reader(services: Services, manifest: DatasetManifest) -> None:
    for job in services.jobs.active_of(manifest.tenant):
        texts = (job.spec.calibration, job.spec.evaluation)
        if any(text is not None and text.source == manifest.reference for text in texts):
            raise Conflict(
                f"dataset {manifest.id} is read by job {job.id}, which has not ended",
                code="dataset_in_use",
                remedy="wait for the job's end, or cancel it first",
            )


def check_name(name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name[:200]!r} is no name of a text file",
            code="dataset_name_invalid",
            remedy=f"use letters, digits and . _ - and an end of {READ_ENDINGS}",
            param="name",
        )
    if text_suffix(name) is None:
        raise InvalidRequest(
            f"the name of {name} must end in one of {READ_ENDINGS}",
            code="dataset_name_invalid",
            remedy=CONVERT_REMEDY,
            param="name",
        )


def require_bare_file(request: Request) -> None:
    """Refuse a form: its boundaries would be read as text."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise InvalidRequest(
            "the body is a form with a file in it, not the file",
            code="dataset_is_form",
            remedy="send the file itself, as application/octet-stream: curl -T FILE -X POST instead of -F",
        )


def room_for(services: Services, principal: Principal) -> tuple[int, NibbleError]:
    """The most bytes that may come, and the error beyond them. Raises QuotaExceeded if there is no room."""
    services.limits.require_storage(principal.tenant)
    most = services.limits.of(principal.tenant).storage_bytes
    room = most - services.limits.stored_bytes(principal.tenant) if most else MAX_TEXT_BYTES
    if room < MAX_TEXT_BYTES:
        return room, QuotaExceeded(
            f"the file is larger than the {room} bytes that the tenant {principal.tenant} may still store",
            code="storage_quota_exceeded",
            remedy="delete artifacts or datasets, or let the operator raise the limit",
        )
    return MAX_TEXT_BYTES, BodyTooLarge(
        f"the file is larger than {MAX_TEXT_BYTES} bytes", remedy="upload a part of it, or pack it as .gz"
    )


class Upload:
    """A file on its way from a caller to object storage: counted, hashed and looked at as it comes."""

    def __init__(self, request: Request, name: str, most: int, too_large: NibbleError) -> None:
        self.request, self.name = request, name
        self.most, self.too_large = most, too_large
        self.size, self.digest = 0, hashlib.sha256()
        self.head = bytearray()
        self.is_checked = False
        self.fault: BaseException | None = None  # why no more of it is taken

    async def stored(self, services: Services, dataset_id: str, sha256: str | None) -> TextPreview:
        """Store the file; its preview. Raises TextRefused for what can't be read, and for another digest."""
        try:
            await services.objects.put_as_it_comes(dataset_content_key(dataset_id), self.chunks())
        except Exception:
            if self.fault is not None:  # the store's library has an error of its own for ours
                raise self.fault from None
            raise
        if self.size == 0:
            raise TextRefused(f"{self.name} is empty", code="text_empty", remedy="send the file as the body")
        if sha256 not in (None, self.digest.hexdigest()):
            raise InvalidRequest(
                f"{self.name} came with the SHA-256 {self.digest.hexdigest()}, not {sha256}",
                code="dataset_damaged", remedy="send the file again", param="sha256",
            )  # fmt: skip
        return await run_in_threadpool(preview_of, self.name, bytes(self.head), self.size)

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            stream = self.request.stream()
            while True:
                async with asyncio.timeout(BODY_LIMIT_S):
                    chunk = await anext(stream, None)
                if chunk is None:
                    return
                if chunk:
                    await self.take(chunk)
                    yield chunk
        except TimeoutError as fault:
            self.fault = too_slow()
            raise self.fault from fault
        except BaseException as fault:
            self.fault = fault
            raise

    async def take(self, chunk: bytes) -> None:
        """Raises what is wrong with the file so far."""
        self.size += len(chunk)
        if self.size > self.most:
            raise self.too_large
        self.digest.update(chunk)
        if len(self.head) < PREVIEW_BYTES:
            self.head += chunk[: PREVIEW_BYTES - len(self.head)]
        if len(self.head) > HEAD_BYTES and not self.is_checked:
            self.is_checked = True
            await run_in_threadpool(check_head, self.name, bytes(self.head[:HEAD_BYTES]), is_whole=False)
