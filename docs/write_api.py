"""Writes docs/api.md from the service's OpenAPI document: `python docs/write_api.py`; a test compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.core.settings import Settings
from app.main import create_app

PAGE = Path(__file__).parent / "api.md"
INTRODUCTION = """# The HTTP API

Made from the service's OpenAPI document (`/openapi.json`), which has every schema. Errors of the management
routes are `application/problem+json` with a stable `code` and a `remedy`; the inference routes answer as
OpenAI's do. Send your key as `Authorization: Bearer …`.
"""


def page() -> str:
    document = create_app(Settings()).openapi()
    parts = [INTRODUCTION]
    for tag, routes in by_tag(document).items():
        parts.append(f"## {tag.capitalize()}\n")
        parts += [section(*route) for route in routes]
    return "\n".join(parts)


def by_tag(document: dict[str, Any]) -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    tags: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = operation.get("tags", ["other"])[0]
            tags.setdefault(tag, []).append((method.upper(), path, operation))
    return tags


def section(method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [f"### `{method} {path}`\n", operation.get("description", operation["summary"]).strip() + "\n"]
    rows = [
        f"| `{each['name']}` | {each['in']} | {each.get('description', '')} |"
        for each in operation.get("parameters", [])
    ]
    if rows:
        lines += ["| parameter | in | |", "|---|---|---|", *rows, ""]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in body:
        lines.append(f"Body: `{body['$ref'].rsplit('/', 1)[1]}`.\n")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
