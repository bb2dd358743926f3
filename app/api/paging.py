"""The parameters of every list's page."""

from __future__ import annotations

from pydantic import BaseModel, Field


class PageQuery(BaseModel):
    """Which items of a list, newest first."""

    limit: int = Field(default=20, ge=1, le=100)
    after: str | None = Field(default=None, description="`next` of the previous page.")
