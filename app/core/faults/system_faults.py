"""Explain operating system errors, also those that a library has wrapped in an error of its own.

Libraries in Rust (safetensors, tokenizers, obstore) and PyTorch raise errors without `errno`, whose text says
`No space left on device (os error 28)` or `No space left on device (28)`.
"""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from app.core.errors import WorkerDisk

STATE_FOLDER = "the worker's NIBBLE_STATE_DIR"  # where its files lie
NUMBER = re.compile(r" \((?:os error )?(\d{1,3})\)")
# Classes that are raised without a number, too.
OF_CLASS = ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES))


class Refusal(NamedTuple):
    """A kind of refusal: the error numbers, what happened, and a remedy that may name `location`."""

    numbers: frozenset[int]
    what: str
    remedy: str


REFUSALS = (
    Refusal(
        frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}),
        "the disk is full",
        "free space in {location}",
    ),
    Refusal(
        frozenset({errno.EMFILE, errno.ENFILE}),
        "too many files are open",
        "raise the limit of open files (ulimit -n, LimitNOFILE)",
    ),
    Refusal(
        frozenset({errno.EACCES, errno.EROFS}),
        "a file may not be read or written",
        "let this process's user read the model and write to {location}",
    ),
    Refusal(
        frozenset({errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.EUCLEAN}),
        "the disk failed",
        "look for errors of the disk in the kernel log of this host",
    ),
    Refusal(
        frozenset({errno.ENOENT, errno.ENOTDIR}),
        "a file is gone",
        "let nobody remove files of the model, or in {location}, while a job runs",
    ),
)


def system_number(error: BaseException) -> int | None:
    """The operating system's number (`errno`) of an error or of its causes; None if it has none."""
    link: BaseException | None = error
    while link is not None:
        number = own_number(link)
        if number is not None:
            return number
        link = link.__cause__  # not its context: the error being handled may be unrelated
    return None


def own_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    for match in NUMBER.finditer(text):
        # Only a number that follows the system's own message counts: others may be in brackets, too.
        if text[: match.start()].endswith(os.strerror(int(match[1]))):
            return int(match[1])
    return next((number for kind, number in OF_CLASS if isinstance(error, kind)), None)


def system_fault(error: BaseException, location: str) -> WorkerDisk | None:
    """The error as a fault of the host's files; None if it is none.

    `location` names the files for the reader: a setting or a folder.
    """
    number = system_number(error)
    for refusal in REFUSALS:
        if number in refusal.numbers:
            first_line = str(error).partition("\n")[0]
            remedy = refusal.remedy.format(location=location)
            return WorkerDisk(f"{refusal.what}: {first_line}", remedy=remedy)
    return None
