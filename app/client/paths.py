"""Where resources are."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

import httpx

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def job_route(job_id: str, *parts: str) -> str:
    return route("jobs", job_id, *parts)


def artifact_route(artifact_id: str, *parts: str) -> str:
    return route("artifacts", artifact_id, *parts)


def deployment_route(deployment_id: str) -> str:
    return route("deployments", deployment_id)


def route(*parts: str) -> str:
    """A route of these parts: an id that holds a slash must not become another route."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def file_route(artifact_id: str, path: str) -> str:
    return f"{artifact_route(artifact_id)}/files/{quote(path)}"


def given(params: Mapping[str, object | None]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items() if value is not None}


def is_loopback(url: str) -> bool:
    return httpx.URL(url).host in LOOPBACK
