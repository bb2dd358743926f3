"""The paths of the API's resources."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

import httpx

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def job_route(job_id: str, *segments: str) -> str:
    return route("jobs", job_id, *segments)


def artifact_route(artifact_id: str, *segments: str) -> str:
    return route("artifacts", artifact_id, *segments)


def dataset_route(dataset_id: str) -> str:
    return route("datasets", dataset_id)


def deployment_route(deployment_id: str) -> str:
    return route("deployments", deployment_id)


def route(*segments: str) -> str:
    """The route of these segments, quoted so that a slash in an id leads to no other route."""
    return "/v1/" + "/".join(quote(segment, safe="") for segment in segments)


def file_route(artifact_id: str, path: str) -> str:
    return f"{artifact_route(artifact_id)}/files/{quote(path)}"


def query(params: Mapping[str, object | None]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items() if value is not None}


def is_loopback(url: str) -> bool:
    return httpx.URL(url).host in LOOPBACK
