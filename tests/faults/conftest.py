"""The servers of the integration tests serve here too."""

from __future__ import annotations

from tests.integration.conftest import redis_server, redis_url, s3_endpoint, s3_server

__all__ = ["redis_server", "redis_url", "s3_endpoint", "s3_server"]
