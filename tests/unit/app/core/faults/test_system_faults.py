"""What the operating system refuses, as libraries tell it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import LocalStore
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from app.core.errors import Unavailable
from app.core.faults.system_faults import REFUSALS, system_fault, system_number
from app.core.storage.object_store import ObjectStore
from tests.small_disk import small_disk
from tests.tiny_models import TOKENIZER

ROOM = 256 * 1024
LARGE = {"a": torch.zeros(ROOM)}


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def in_context(error: BaseException, context: BaseException) -> BaseException:
    error.__context__ = context
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/work/file")
ERRORS: list[tuple[BaseException, int | None]] = [
    (FULL, errno.ENOSPC),
    (SafetensorError("Error: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
    (SafetensorError('Error: No such file or directory (os error 2) at path "/work/.tmp1"'), errno.ENOENT),
    (Exception("Too many open files (os error 24)"), errno.EMFILE),
    (RuntimeError("unable to write to file </torch_7>: No space left on device (28)"), errno.ENOSPC),
    (RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"), errno.ENOMEM),
    (FileNotFoundError("No such file or directory: /work/file"), errno.ENOENT),  # as safetensors raises it
    (OSError("No such device (os error 19)"), errno.ENODEV),
    (caused(ValueError("the file can't be written"), FULL), errno.ENOSPC),
    (in_context(ValueError("shapes differ"), FULL), None),
    (ValueError("a tensor of another size (28)"), None),
    (ValueError("a made-up error (os error 999)"), None),
    (SafetensorError("Error while deserializing header: header too large"), None),
    (OSError("no number"), None),
]  # fmt: skip


@pytest.mark.parametrize(("error", "number"), ERRORS, ids=lambda value: str(value)[:60])
def test_the_systems_number_behind_an_error(error: BaseException, number: int | None) -> None:
    assert system_number(error) == number


@pytest.mark.parametrize("number", sorted(set().union(*(refusal.numbers for refusal in REFUSALS))))
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_each_kind_has_words_of_its_own(number: int, is_wrapped: bool) -> None:
    text = os.strerror(number)
    error = SafetensorError(f"I/O error: {text} (os error {number})") if is_wrapped else OSError(number, text)
    fault = system_fault(error, "the folder")
    refusal = next(refusal for refusal in REFUSALS if number in refusal.numbers)
    assert fault is not None
    assert fault.code == "worker_disk"
    assert fault.message.startswith(f"{refusal.what}: ")
    assert text in fault.message
    assert fault.remedy == refusal.remedy.format(location="the folder")


def test_each_number_has_one_kind() -> None:
    numbers = [number for refusal in REFUSALS for number in refusal.numbers]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPIPE, errno.ECONNREFUSED, errno.ECHILD])
def test_what_has_nothing_to_do_with_files_is_none(number: int) -> None:
    assert system_fault(OSError(number, os.strerror(number)), "the folder") is None


def put(folder: Path) -> None:
    LocalStore(folder).put("object", bytes(4 * ROOM))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "python": lambda folder: (folder / "file").write_bytes(bytes(4 * ROOM)),
    "safetensors": lambda folder: save_file(LARGE, folder / "file.safetensors"),
    "tokenizers": lambda folder: Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).save(f"{folder}/t"),
    "obstore": put,
}  # fmt: skip


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_a_disk_that_is_really_full(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    with small_disk(tmp_path / "disk", ROOM) as disk:
        with pytest.raises(Exception, match="No space left on device") as raised:
            write(disk)
        assert system_number(raised.value) == errno.ENOSPC


@pytest.mark.parametrize(
    "write", [WRITERS[name] for name in ("python", "safetensors", "tokenizers")],
    ids=["python", "safetensors", "tokenizers"],
)  # fmt: skip
def test_no_more_files_may_be_opened(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    error: BaseException | None = None
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        write(tmp_path)
    except Exception as raised:  # noqa: BLE001  # the libraries raise nothing more precise
        error = raised
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert error is not None
    assert system_number(error) == errno.EMFILE


@pytest.mark.parametrize("write", [WRITERS["python"], WRITERS["safetensors"]], ids=["python", "safetensors"])
def test_a_folder_that_is_gone(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    with pytest.raises(Exception, match="No such file or directory") as raised:
        write(tmp_path / "gone")
    assert system_number(raised.value) == errno.ENOENT


def test_a_full_folder_of_objects_is_not_said_to_be_of_s3(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", ROOM) as disk:
        store = ObjectStore(disk.as_uri())
        with pytest.raises(Unavailable, match="No space left on device") as refusal:
            store.put("jobs/a", bytes(4 * ROOM))
    assert refusal.value.code == "storage_unavailable"
    assert "free space in the folder of NIBBLE_STORAGE_URL" in refusal.value.remedy
