from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.core.settings import Settings

LINE = re.compile(r"^# (NIBBLE_[A-Z_]+)=(.*)$", re.MULTILINE)


def documented(repository: Path) -> dict[str, str]:
    return dict(LINE.findall((repository / ".env.example").read_text()))


def test_every_setting_is_documented_and_no_other(repository: Path) -> None:
    names = {f"NIBBLE_{name.upper()}" for name in Settings.model_fields}
    assert set(documented(repository)) == names


def test_the_documented_defaults_are_the_defaults(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("NIBBLE_STATE_DIR")
    defaults = Settings()
    for name, value in documented(repository).items():
        monkeypatch.setenv(name, value)
    assert Settings() == defaults


def test_the_state_folder_follows_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NIBBLE_STATE_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = Settings()
    assert settings.state_dir == tmp_path / "nibble"
    assert settings.object_store_url == (tmp_path / "nibble" / "storage").as_uri()


def test_model_roots_are_split_at_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_MODEL_ROOTS", "/models:/data/models:")
    assert Settings().model_roots == (Path("/models"), Path("/data/models"))


@pytest.mark.parametrize("value", ['["/a", "/b"]', '["/a"]', ' ["a"]', "[]"])
@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("MODEL_ROOTS", "/models:/data/models"), ("ALLOWED_HOSTS", "first,second"),
        ("OUTGOING_NETWORKS", "first,second"), ("CALIBRATION_DEVICES", "first,second"),
    ],
)  # fmt: skip
def test_json_lists_are_refused_with_how_to_write_them(
    monkeypatch: pytest.MonkeyPatch, name: str, example: str, value: str
) -> None:
    """They were taken for one folder or name."""
    monkeypatch.setenv(f"NIBBLE_{name}", value)
    with pytest.raises(ValidationError, match=f"this is a JSON list; write the items as in {example}"):
        Settings()


def test_a_dead_worker_is_noticed_within_a_minute() -> None:
    """Its lease runs out, and then a janitor comes by."""
    settings = Settings()
    assert settings.lease_s + settings.janitor_interval_s < 60


def test_settings_never_change(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


def test_secrets_are_not_printed(tmp_path: Path) -> None:
    settings = Settings(
        state_dir=tmp_path, redis_url="redis://:hunter2@host", bootstrap_api_key="hunter2-hunter2-hunter2-h"
    )
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(("name", "value"), [("PORT", "70000"), ("LEASE_S", "0"), ("LOG_LEVEL", "loud")])
def test_impossible_values_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"NIBBLE_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()
