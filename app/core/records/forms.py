"""Strings with a required pattern: the schema shows it, and the error describes it in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

SHOWN = 100  # characters of a wrong text in the message


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
