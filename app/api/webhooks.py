"""The webhooks of a job, and the secret that signs them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.api.dependencies import Admin, JobsReader, JobsWriter, ServicesParam
from app.api.paging import PageQuery
from app.core.outgoing.webhook_messages import Delivery, DeliveryState, WebhookTry
from app.core.records.ids import check_cursor

router = APIRouter(prefix="/v1", tags=["webhooks"])


class DeliveryView(BaseModel):
    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str
    job: str
    type: str
    url: str
    state: DeliveryState
    created_at: datetime
    tries: tuple[WebhookTry, ...]

    @classmethod
    def of(cls, delivery: Delivery) -> Self:
        return cls(**delivery.model_dump(include=set(cls.model_fields) - {"object"}))


class DeliveryList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[DeliveryView, ...]
    has_more: bool = False
    next: str | None = None


class DeliveryQuery(PageQuery):
    """Of `GET /v1/webhook-deliveries`."""

    state: DeliveryState | None = None
    limit: int = Field(default=50, ge=1, le=100)


class WebhookSecret(BaseModel):
    object: Literal["webhook_secret"] = "webhook_secret"
    secret: str


@router.get("/jobs/{job_id}/webhook-deliveries")
def list_deliveries(job_id: str, services: ServicesParam, principal: JobsReader) -> DeliveryList:
    """The job's webhooks with every attempt, oldest first; kept for 30 days."""
    services.jobs.get(principal.tenant, job_id)
    return DeliveryList(data=tuple(DeliveryView.of(one) for one in services.deliveries.list(job_id)))


@router.post("/jobs/{job_id}/webhook-deliveries/{delivery_id}/redeliver", status_code=202)
def redeliver_message(
    job_id: str, delivery_id: str, services: ServicesParam, principal: JobsWriter
) -> DeliveryView:
    """Send a webhook again with the same id."""
    services.jobs.get(principal.tenant, job_id)
    return DeliveryView.of(services.deliveries.redeliver(job_id, delivery_id))


@router.get("/webhook-deliveries")
def list_recent_deliveries(
    services: ServicesParam, principal: JobsReader, query: Annotated[DeliveryQuery, Query()]
) -> DeliveryList:
    """The newest 1,000 webhooks of the last 30 days about any of the tenant's jobs, newest first."""
    check_cursor("msg", query.after)
    limit, before, state = query.limit, query.after, query.state
    deliveries = services.deliveries.page(principal.tenant, limit=limit + 1, before=before, state=state)
    data = tuple(DeliveryView.of(delivery) for delivery in deliveries[:limit])
    has_more = len(deliveries) > limit
    return DeliveryList(data=data, has_more=has_more, next=data[-1].id if has_more else None)


@router.get("/webhook-secret")
def read_webhook_secret(services: ServicesParam, principal: Admin) -> WebhookSecret:
    """The secret that signs the tenant's webhooks."""
    return WebhookSecret(secret=services.webhook_secrets.of(principal.tenant)[0])


@router.post("/webhook-secret/rotate")
def rotate_webhook_secret(services: ServicesParam, principal: Admin) -> WebhookSecret:
    """Replace the secret. For a day, webhooks are signed with the old one too."""
    return WebhookSecret(secret=services.webhook_secrets.rotate(principal.tenant))
