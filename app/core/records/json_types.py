"""JSON's types as they are: in records `true` is no number, `"yes"` no boolean, `"8"` no integer.

pydantic's own strict mode would also refuse 44.0, which is an integer in JSON, and lists for tuples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema


def takes_boolean(value: Any) -> Any:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        raise PydanticKnownError("bool_type")
    return value


def takes_integer(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise PydanticKnownError("int_type")
    return value


def takes_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise PydanticKnownError("float_type")
    return value


class KeyRepeated(ValueError):
    """An object of JSON names a key twice, of which the last would count in silence."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:100]!r} occurs twice")


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `object_pairs_hook` of json.loads. Raises KeyRepeated."""
    read = dict(pairs)
    if len(read) < len(pairs):
        raise KeyRepeated(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return read


CHECKS: dict[object, Callable[[Any], Any]] = {
    "bool": takes_boolean,
    "int": takes_integer,
    "float": takes_number,
}
UNCHANGED = ("metadata", "serialization")


def checked(schema: Any) -> Any:
    """A schema of pydantic's with a check before each boolean, integer and number."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(checked, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind == "function-before" and schema["function"]["function"] in CHECKS.values():
        return schema  # of a record within this one
    if isinstance(kind, str) and kind in CHECKS:
        return core_schema.no_info_before_validator_function(CHECKS[kind], schema)
    return {key: value if key in UNCHANGED else checked(value) for key, value in schema.items()}


class JsonTyped(BaseModel):
    """Base of records whose booleans, integers and numbers take no other type of JSON."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema: CoreSchema = checked(handler(source))
        return schema
