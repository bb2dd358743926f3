"""Strings with a required pattern: the schema shows it, and the error describes it in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

SHOWN = 100  # characters of a wrong text in the message
DATE = re.compile(r"\d{4}-\d\d-\d\d(T|$)")


def written_time(text: str) -> datetime:
    """The time of ISO 8601 text, in UTC without a zone. Raises ValueError, also for a number of seconds."""
    try:
        if DATE.match(text):
            moment = datetime.fromisoformat(text)
            return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    except ValueError:
        pass  # told below
    raise ValueError(
        f"{text[:SHOWN]!r} is not a time: write it as 2026-11-28, 2026-11-28T12:00:00Z or "
        "2026-11-28T12:00:00+01:00 (in a URL %2B for +)"
    )


@dataclass(frozen=True)
class Form:
    """Annotation of `str`: the whole text must match `pattern`; `description` completes "x is not …"."""

    pattern: str
    description: str

    def check(self, text: str) -> str:
        if re.fullmatch(self.pattern, text) is None:
            raise PydanticCustomError(
                "string_pattern_mismatch",
                "{text} is not {form}",
                {"text": repr(text[:SHOWN]), "form": self.description},
            )
        return text

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "pattern": self.pattern}
