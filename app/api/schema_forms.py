"""Schemas in the forms that generators of clients read.

openapi-python-client 0.29, openapi-generator 7.26 and spectral 6.16 stumble over an enum of texts and
numbers, a tuple without `items`, an object as the default of a union, and two schemas of one title, as of a
record that is read otherwise than written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TYPES: dict[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}


def with_readable_schemas(document: dict[str, Any]) -> dict[str, Any]:
    """The document, changed in place."""
    for name, schema in document["components"]["schemas"].items():
        schema["title"] = name.replace("-", "")
    for schema in nodes(document):
        split_enum(schema)
        add_items(schema)
        drop_default_object(schema)
    return document


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document, children first."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from nodes(child)
    if isinstance(value, dict):
        yield value


def split_enum(schema: dict[str, Any]) -> None:
    """One alternative for each type of its values."""
    values = schema.get("enum")
    if not isinstance(values, list):
        return
    by_type: dict[str, list[Any]] = {}
    for value in values:
        by_type.setdefault(TYPES.get(type(value), "null"), []).append(value)
    if len(by_type) > 1:
        del schema["enum"]
        schema.pop("type", None)
        schema["anyOf"] = [{"type": kind, "enum": each} for kind, each in by_type.items()]


def add_items(schema: dict[str, Any]) -> None:
    """What any element of a tuple may be."""
    elements = schema.get("prefixItems")
    if isinstance(elements, list) and "items" not in schema:
        distinct = [each for index, each in enumerate(elements) if each not in elements[:index]]
        schema["items"] = distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def drop_default_object(schema: dict[str, Any]) -> None:
    """The object's own properties say their defaults."""
    if "anyOf" in schema and isinstance(schema.get("default"), dict):
        del schema["default"]
