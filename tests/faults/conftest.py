"""The servers of the integration tests serve here too."""

from __future__ import annotations

from tests.integration.conftest import s3_endpoint, s3_server

__all__ = ["s3_endpoint", "s3_server"]
