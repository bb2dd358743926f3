"""Refuses query parameters that a route does not have: a slip like `?stat=failed` would list every job."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app.api.dependencies import CallerWith
from app.core.errors import InvalidRequest


async def refuse_unknown_parameters(request: Request) -> None:
    """The dependency of every route below /v1 but those of inference, whose clients may send more."""
    path = request.url.path
    if not request.scope["query_string"] or not path.startswith("/v1/"):
        return
    operation, taken = f"{request.method} {path[:200]}", parameters_of(request.scope["route"])
    for name in request.query_params:
        if name not in taken:
            await admit(request)
            raise InvalidRequest(
                f"{operation} has no parameter {name[:100]!r}",
                code="unknown_parameter",
                remedy=f"leave it out; it takes {', '.join(taken)}"
                if taken
                else "leave it out; it takes none",
                param=name[:100],
            )


async def admit(request: Request) -> None:
    """Who calls is settled before what is refused, which is counted and logged as any other request."""
    for dependency in request.scope["route"].dependant.dependencies:
        if isinstance(dependency.call, CallerWith):
            await dependency.call(request)


def parameters_of(route: APIRoute) -> tuple[str, ...]:
    """The names of the route's query parameters, as in the OpenAPI document."""
    names: list[str] = []
    for field in route.dependant.query_params:
        kind: Any = field.field_info.annotation
        is_record = isinstance(kind, type) and issubclass(kind, BaseModel)
        names += kind.model_fields if is_record else [field.alias]
    return tuple(names)
