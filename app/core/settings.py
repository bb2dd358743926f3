"""Every setting of the service, read once from `NIBBLE_*` variables by the main of each process."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal, TypedDict
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr
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


def header_values(text: str) -> dict[str, str]:
    """Of `name=value,name=value`, values percent-encoded, as OTEL_EXPORTER_OTLP_HEADERS is written.

    Raises ValueError, which does not repeat what may be a key.
    """
    headers = {}
    for number, item in enumerate(text.split(","), 1):
        name, separator, value = (share.strip() for share in item.partition("="))
        if not separator or HEADER_NAME.fullmatch(name) is None:
            raise ValueError(f"header {number} is not written as name=value; write name=value,name=value")
        headers[name] = unquote(value)
    return headers


def well_formed(headers: SecretStr | None) -> SecretStr | None:
    if headers is not None:
        header_values(headers.get_secret_value())
    return headers


HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a token of RFC 9110
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


def whole_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Scheme, host and port each, as a browser sends them, or `*` alone for every page."""
    for origin in origins:
        if origin == "*" and len(origins) == 1:
            continue
        parts = urlsplit(origin)
        if not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise ValueError(
                f"{origin!r} is no origin; write scheme, host and port as in https://chat.example, or * alone"
            )
    return origins


Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(split_names)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_names)]
Origins = Annotated[Names, AfterValidator(whole_origins)]
Folder = Annotated[Path, AfterValidator(absolute)]
Folders = Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(split_folders)]
OptionalPort = Annotated[Annotated[int, Field(ge=1, le=65535)] | None, BeforeValidator(empty_is_none)]
OptionalHeaders = Annotated[SecretStr | None, BeforeValidator(empty_is_none), AfterValidator(well_formed)]
OptionalUrl = Annotated[str | None, BeforeValidator(empty_is_none)]


class SourceAccess(TypedDict):
    """What models and texts are opened with."""

    model_roots: tuple[Path, ...]
    networks: tuple[IPv4Network | IPv6Network, ...]
    hub_token: SecretStr | None


class Settings(BaseSettings):
    """`.env.example` documents each name; a test compares the two."""

    model_config = SettingsConfigDict(
        env_prefix="NIBBLE_", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    _tenant: str | None = PrivateAttr(default=None)  # whom these settings act for

    state_dir: Folder = Field(default_factory=default_state_dir, validate_default=True)
    host: str = "127.0.0.1"
    port: int = Field(default=8420, ge=0, le=65535)
    probe_port: OptionalPort = None
    allowed_hosts: Names = ()
    cors_origins: Origins = ()
    # No repr: the URL may hold a password.
    redis_url: OptionalUrl = Field(default=None, repr=False)
    redis_server: str = "auto"
    storage_url: OptionalUrl = None
    model_roots: Folders = ()
    outgoing_networks: Networks = ()
    bootstrap_api_key: Annotated[SecretStr | None, BeforeValidator(empty_is_none)] = None
    hub_token: Annotated[SecretStr | None, BeforeValidator(empty_is_none)] = None
    secret_key: Annotated[SecretStr | None, BeforeValidator(empty_is_none)] = None
    kernel_backend: str = "auto"
    calibration_devices: Names = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: OptionalUrl = None
    otlp_headers: OptionalHeaders = None
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

    @classmethod
    def is_secret(cls, name: str) -> bool:
        """Whether the field may hold a secret, which no message may show."""
        field = cls.model_fields.get(name)
        return field is not None and (not field.repr or "SecretStr" in str(field.annotation))

    @property
    def accepted_hosts(self) -> frozenset[str] | None:
        """Names under which this service may be called; None for any.

        On loopback only its own names: another name that leads here was made to lead here by a foreign page.
        """
        if self.allowed_hosts:
            return frozenset(self.allowed_hosts) | LOOPBACK_NAMES
        return LOOPBACK_NAMES if self.host in LOOPBACK_NAMES else None

    @property
    def otlp_header_values(self) -> dict[str, str]:
        return {} if self.otlp_headers is None else header_values(self.otlp_headers.get_secret_value())

    @property
    def object_store_url(self) -> str:
        """The object store's URL: `storage_url`, or a folder in the state folder."""
        return self.storage_url or (self.state_dir / "storage").as_uri()

    @property
    def source_access(self) -> SourceAccess:
        return {
            "model_roots": self.model_roots,
            "networks": self.outgoing_networks,
            "hub_token": self.hub_token,
        }

    def acting_with(self, hub_token: SecretStr | None) -> Settings:
        """These settings for a job that brings a hub token of its own; None leaves the service's."""
        return self if hub_token is None else self.model_copy(update={"hub_token": hub_token})

    @property
    def tenant(self) -> str | None:
        """Whose uploads may be read; None: nobody's."""
        return self._tenant

    def acting_for(self, tenant: str) -> Settings:
        """These settings for work of a tenant."""
        other = self.model_copy()
        other._tenant = tenant
        return other

    @property
    def model_cache_dir(self) -> Path:
        """Where the workers of this host keep downloaded models."""
        return self.state_dir / "cache" / "models"

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
