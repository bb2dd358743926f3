"""`/v1/settings`: the settings of this API process, without what is secret in them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel, SecretStr

from app.api.dependencies import Operator, ServicesParam
from app.core.settings import Settings

router = APIRouter(prefix="/v1/settings", tags=["operations"])

MEANINGS = Path(__file__).parent / "setting_meanings.json"  # written by docs/write_settings.py
HIDDEN = "***"
URL = re.compile(r"([a-z][a-z0-9+.-]*://)?(.*)", re.IGNORECASE | re.DOTALL)


class SettingView(BaseModel):
    object: Literal["setting"] = "setting"
    name: str  # of the environment variable
    value: str | None  # as it is written in the variable; None: empty
    is_set: bool  # False: the default holds
    is_secret: bool  # then `value` shows at most where a URL leads
    meaning: str

    @classmethod
    def of(cls, settings: Settings, field: str) -> Self:
        name = f"NIBBLE_{field.upper()}"
        return cls(
            name=name,
            value=shown(getattr(settings, field), is_secret=Settings.is_secret(field)),
            is_set=field in settings.model_fields_set,
            is_secret=Settings.is_secret(field),
            meaning=meanings()[name],
        )


class SettingList(BaseModel):
    object: Literal["list"] = "list"
    data: tuple[SettingView, ...]
    has_more: bool = False
    next: str | None = None


@cache
def meanings() -> dict[str, str]:
    read: dict[str, str] = json.loads(MEANINGS.read_text("utf-8"))
    return read


def shown(value: Any, *, is_secret: bool = False) -> str | None:
    """A setting's value without passwords and keys; None for one that is empty."""
    if value is None or value == () or value == "":
        return None
    if isinstance(value, SecretStr) or (is_secret and "://" not in str(value)):
        return HIDDEN
    if isinstance(value, tuple):
        separator = ":" if isinstance(value[0], Path) else ","
        return separator.join(shown(item) or "" for item in value)
    return without_password(value) if isinstance(value, str) else str(value)


def without_password(text: str) -> str:
    """Where a URL leads: without its user and password, and without its query, which may hold both."""
    match = URL.fullmatch(text)
    assert match is not None  # it takes every text
    scheme, rest = match[1] or "", match[2]
    address, mark, query = re.fullmatch(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    if "@" in query:  # a password with ? or # in it, or one in the query: nobody can tell
        return scheme + HIDDEN
    user, separator, host = address.rpartition("@")
    return f"{scheme}{HIDDEN + separator if user or separator else ''}{host}{mark + HIDDEN if query else ''}"


@router.get("")
def list_settings(services: ServicesParam, principal: Operator) -> SettingList:
    """Each setting of the API process that answers; workers have their own. Secrets are masked."""
    fields = Settings.model_fields
    return SettingList(data=tuple(SettingView.of(services.settings, field) for field in fields))
