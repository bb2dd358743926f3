"""The piece of a Lua script that records a webhook's delivery, in the step that it reports."""

from __future__ import annotations

from app.core.changes.redis_keys import DUE, deliveries_key, delivery_key, tenant_deliveries_key
from app.core.outgoing.webhook_messages import MAX_OF_TENANT, Delivery

DELIVERIES_KEPT_S = 30 * 24 * 3600

DELIVERY_KEYS = ("delivery", "deliveries", "tenant_deliveries", "due")
DELIVERY_ARGS = ("message_id", "message")  # '' for no message
RECORD_DELIVERY = f"""
if message_id ~= '' then
  redis.call('SET', delivery, message, 'EX', {DELIVERIES_KEPT_S})
  redis.call('ZADD', deliveries, 0, message_id)
  redis.call('EXPIRE', deliveries, {DELIVERIES_KEPT_S})
  redis.call('ZADD', tenant_deliveries, 0, message_id)
  redis.call('ZREMRANGEBYRANK', tenant_deliveries, 0, -{MAX_OF_TENANT + 1})
  redis.call('EXPIRE', tenant_deliveries, {DELIVERIES_KEPT_S})
  redis.call('ZADD', due, redis.call('TIME')[1], message_id)
end
"""


def delivery_keys(job_id: str, message: Delivery | None) -> dict[str, str | None]:
    """For DELIVERY_KEYS and DELIVERY_ARGS, which touch none of the keys without a message."""
    return {
        "delivery": delivery_key(message.id if message else "none"),
        "deliveries": deliveries_key(job_id),
        "tenant_deliveries": tenant_deliveries_key(message.tenant if message else "none"),
        "due": DUE,
        "message_id": message.id if message else None,
        "message": message.model_dump_json() if message else None,
    }
