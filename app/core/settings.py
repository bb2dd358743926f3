"""Every setting of the service, read once from `NIBBLE_*` variables by the main of each process."""

from __future__ import annotations

import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.core.errors import Unavailable


def default_state_dir() -> Path:
    """`nibble` under the user's data folder (XDG base directory specification)."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "nibble"


def absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def split_folders(value: object) -> object:
    return split(value, ":", "/models:/data/models")


def empty_is_none(value: object) -> object:
    return None if value == "" else value


def split_names(value: object) -> object:
    names = split(value, ",", "first,second")
    return [name.strip().lower() for name in names if name.strip()] if isinstance(names, list) else names


def split(value: object, separator: str, example: str) -> object:
    """The items of a variable's text. A JSON list is refused: it would be read as names with brackets."""
    if not isinstance(value, str):
        return value
    if value.strip().startswith("["):
        raise ValueError(f"this is a JSON list; write the items as in {example}")
    return [item for item in value.split(separator) if item]


LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})

Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(split_names)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_names)]
Folder = Annotated[Path, AfterValidator(absolute)]
Folders = Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(split_folders)]
OptionalPort = Annotated[Annotated[int, Field(ge=1, le=65535)] | None, BeforeValidator(empty_is_none)]
OptionalUrl = Annotated[str | None, BeforeValidator(empty_is_none)]


class Settings(BaseSettings):
    """`.env.example` documents each name; a test compares the two."""

    model_config = SettingsConfigDict(env_prefix="NIBBLE_", frozen=True, extra="forbid")

    state_dir: Folder = Field(default_factory=default_state_dir, validate_default=True)
    host: str = "127.0.0.1"
    port: int = Field(default=8420, ge=0, le=65535)
    probe_port: OptionalPort = None
    allowed_hosts: Names = ()
    # No repr: the URL may hold a password.
    redis_url: OptionalUrl = Field(default=None, repr=False)
    redis_server: str = "auto"
    storage_url: OptionalUrl = None
    model_roots: Folders = ()
    outgoing_networks: Networks = ()
    bootstrap_api_key: Annotated[SecretStr | None, BeforeValidator(empty_is_none)] = None
    kernel_backend: str = "auto"
    calibration_devices: Names = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: OptionalUrl = None
    log_format: Literal["text", "json"] = "text"

    lease_s: float = Field(default=30.0, ge=1, le=300)
    janitor_interval_s: float = Field(default=15.0, ge=0.1, le=300)
    max_attempts: int = Field(default=3, ge=1, le=20)
    retry_pause_s: float = Field(default=5.0, ge=0.1, le=300)
    gc_interval_s: float = Field(default=3600.0, ge=1)
    retention_days: int = Field(default=0, ge=0, le=36500)
    queue_limit: int = Field(default=1000, ge=1)
    tenant_jobs: int = Field(default=0, ge=0)
    tenant_running_jobs: int = Field(default=0, ge=0)
    tenant_storage_bytes: int = Field(default=0, ge=0)
    tenant_requests_per_minute: int = Field(default=0, ge=0, le=10_000_000)
    cancel_grace_s: float = Field(default=5.0, ge=0, le=60)
    model_cache_bytes: int = Field(default=200 * 1000**3, ge=0)
    shard_bytes: int = Field(default=4 * 1024**3, ge=1024**2)
    max_body_bytes: int = Field(default=16 * 1024**2, ge=1024)

    serve_host: str = "127.0.0.1"
    serve_slots: int = Field(default=4, ge=1, le=64)
    load_limit_s: float = Field(default=1800.0, ge=1)
    drain_s: float = Field(default=60.0, ge=0, le=3600)
    inference_limit: int = Field(default=256, ge=1)
    inference_silence_s: float = Field(default=600.0, ge=1)

    @property
    def accepted_hosts(self) -> frozenset[str] | None:
        """Names under which this service may be called; None for any.

        On loopback only its own names: another name that leads here was made to lead here by a foreign page.
        """
        if self.allowed_hosts:
            return frozenset(self.allowed_hosts) | LOOPBACK_NAMES
        return LOOPBACK_NAMES if self.host in LOOPBACK_NAMES else None

    @property
    def object_store_url(self) -> str:
        """The object store's URL: `storage_url`, or a folder in the state folder."""
        return self.storage_url or (self.state_dir / "storage").as_uri()

    @property
    def scratch_dir(self) -> Path:
        """Where jobs of this host keep their work folders."""
        return self.state_dir / "work"


def make_folder(folder: Path) -> None:
    """The state folder or one in it, for this user alone. Raises Unavailable if it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as fault:
        raise Unavailable(
            f"the state folder can't be made: {fault}",
            code="state_dir_unusable",
            remedy="set NIBBLE_STATE_DIR to a folder that you may write",
        ) from fault
