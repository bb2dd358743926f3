"""Texts of a certain form: the schema shows the pattern, and a caller who misses it is told in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

SHOWN = 100  # characters of a wrong text in the message


@dataclass(frozen=True)
class Form:
    """As an annotation of `str`: the whole text must match `pattern`; `told` completes "x is not …"."""

    pattern: str
    told: str

    def check(self, text: str) -> str:
        if re.fullmatch(self.pattern, text) is None:
            raise PydanticCustomError(
                "string_pattern_mismatch",
                "{text} is not {form}",
                {"text": repr(text[:SHOWN]), "form": self.told},
            )
        return text

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "pattern": self.pattern}
