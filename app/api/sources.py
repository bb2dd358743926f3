"""`/v1/sources`: models to choose from, for forms that complete what is typed."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.api.dependencies import JobsReader, ServicesParam
from app.api.services import Services
from app.core.access.api_keys import Principal
from app.core.jobs.job_store import JobFilter
from app.core.sources.model_suggestions import LEAST_LETTERS, hub_models, local_models, matches_words

router = APIRouter(prefix="/v1/sources", tags=["jobs"])

LOOKED_AT = 50  # newest jobs


class SourceView(BaseModel):
    object: Literal["source"] = "source"
    reference: str = Field(description="What `model` of a job names it by.")
    origin: Literal["recent", "folder", "hub"]
    downloads: int | None = Field(default=None, description="Of the last month, as the hub counts.")


class SourceList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[SourceView, ...]
    hub: Literal["asked", "not_asked", "no_answer"]


@router.get("")
def list_sources(
    services: ServicesParam,
    principal: JobsReader,
    q: Annotated[str, Query(max_length=200, description="Words that all occur in the reference.")] = "",
    limit: Annotated[int, Query(ge=1, le=20, description="Of each origin.")] = 8,
) -> SourceList:
    """Models of the tenant's newest jobs, in the folders that jobs may read, and on the hub.

    The hub is asked for text of two letters or more that is no address, without a token.
    """
    text = q.strip().removeprefix("hf:")
    words = text.lower().removeprefix("file://").split()
    sources = [*recent(services, principal, words, limit), *local(services, words, limit)]
    asked = "not_asked"
    if len(text) >= LEAST_LETTERS and "://" not in text and not text.startswith("/"):
        entries = hub_models(text, networks=services.settings.source_access["networks"], limit=limit)
        asked = "no_answer" if entries is None else "asked"
        sources += [
            SourceView(reference=f"hf:{entry.id}", origin="hub", downloads=entry.downloads)
            for entry in entries or ()
        ]
    once = {source.reference: source for source in reversed(sources)}
    data = tuple(source for source in sources if once[source.reference] is source)
    return SourceList(data=data, hub=asked)


def recent(services: Services, principal: Principal, words: list[str], limit: int) -> list[SourceView]:
    """Models of the newest jobs, each once, without the commit that a hub's branch meant then."""
    page = services.jobs.page(principal.tenant, JobFilter(limit=LOOKED_AT))
    models = dict.fromkeys(unpinned(job.spec.model) for job in page.jobs)
    named = [model for model in models if matches_words(model, words)]
    return [SourceView(reference=model, origin="recent") for model in named[:limit]]


def unpinned(model: str) -> str:
    return model.partition("@")[0] if model.startswith("hf:") else model


def local(services: Services, words: list[str], limit: int) -> list[SourceView]:
    paths = local_models(services.settings.model_roots, words, limit)
    return [SourceView(reference=path.as_uri(), origin="folder") for path in paths]
