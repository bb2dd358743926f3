"""The webhooks of a job, and the secret that signs them."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel

from app.api.dependencies import Admin, JobsReader, JobsWriter, ServicesParam
from app.core.outgoing.webhook_messages import Delivery, WebhookTry

router = APIRouter(prefix="/v1", tags=["webhooks"])


class DeliveryView(BaseModel):
    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str
    job: str
    type: str
    url: str
    state: Literal["pending", "delivered", "failed"]
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


@router.get("/webhook-secret")
def read_webhook_secret(services: ServicesParam, principal: Admin) -> WebhookSecret:
    """The secret that signs the tenant's webhooks."""
    return WebhookSecret(secret=services.webhook_secrets.of(principal.tenant)[0])


@router.post("/webhook-secret/rotate")
def rotate_webhook_secret(services: ServicesParam, principal: Admin) -> WebhookSecret:
    """Replace the secret. For a day, webhooks are signed with the old one too."""
    return WebhookSecret(secret=services.webhook_secrets.rotate(principal.tenant))
