"""What `GET /v1/settings` shows of settings that are, or may hold, a secret."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from app.api.service_settings import HIDDEN, SettingView, meanings, shown, without_password
from app.core.settings import Settings

PASSWORD = "hunter2-of-the-operator"
# Every way in which a password gets into a text that says where something is.
URLS = (
    "redis://:{}@host:6379/0", "redis://user:{}@host:6379/0", "rediss://{}@host", "unix:///path?password={}",
    "redis://host:6379/0?username=me&password={}", "https://host/traces#{}", "s3://key:{}@bucket/prefix",
    "redis://:a/{}@host", "redis://:a?{}@host", "redis://:a#{}@host", "redis://:{}@b@host", "redis://a@b:{}@host/0",
    "redis://host?password=a@{}", "user:{}@host", "HTTP://u:{}@HOST",
)  # fmt: skip
ALONE = ("{}", "key={}", "x-api-key={},b=c")  # of settings that are secret as a whole


def settings_with(field: str, text: str) -> Settings | None:
    """None where the setting refuses the text."""
    try:
        return Settings.model_validate({"state_dir": Path("/tmp/x"), field: text})
    except ValidationError:
        return None


@pytest.mark.parametrize("field", Settings.model_fields)
def test_no_setting_shows_a_password(field: str) -> None:
    forms = (*URLS, *ALONE) if Settings.is_secret(field) else URLS
    if "Path" in str(Settings.model_fields[field].annotation):
        return  # folders of this host
    views = {}
    for form in forms:
        settings = settings_with(field, form.format(PASSWORD))
        if settings is not None:
            views[form] = SettingView.of(settings, field).model_dump_json()
    assert {form: view for form, view in views.items() if PASSWORD in view.lower()} == {}
    if Settings.model_fields[field].annotation in (str, str | None):
        assert len(views) == len(forms)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://user:word@host:6379/0", "redis://***@host:6379/0"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("redis://host/0?password=word", "redis://host/0?***"),
        ("redis://:a?b@host", "redis://***"),
        ("http://collector:4318", "http://collector:4318"),
    ],
)
def test_where_a_url_leads_stays_readable(text: str, expected: str) -> None:
    assert without_password(text) == expected


def test_values_are_written_as_in_the_variable() -> None:
    assert shown(SecretStr("word")) == HIDDEN
    assert shown((Path("/a"), Path("/b"))) == "/a:/b"
    assert shown((ip_network("10.0.0.0/8"), ip_network("fd00::/8"))) == "10.0.0.0/8,fd00::/8"
    assert [shown(empty) for empty in (None, (), "")] == [None] * 3
    assert (shown(30.0), shown(0), shown("auto")) == ("30.0", "0", "auto")


def test_each_setting_has_its_meaning() -> None:
    names = {f"NIBBLE_{field.upper()}" for field in Settings.model_fields}
    assert set(meanings()) == names
    assert all(len(meaning) > 10 for meaning in meanings().values())
