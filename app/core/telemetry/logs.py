"""Log lines that carry the ids of what they are about: request, job, attempt.

As text for people, or as one JSON object on each line (`NIBBLE_LOG_FORMAT`). Control characters that came
from outside can't begin a line of their own in either.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from app.core.errors import NibbleError
from app.core.settings import Settings

IDS = ("request", "job", "attempt")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MAX_MESSAGE = 8000
MAX_TRACE = 40_000

# A tuple of pairs: a context is shared with what was started in it and must not be changed from there.
_bound: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("log_ids", default=())


@contextmanager
def log_ids(**ids: str | int | None) -> Iterator[None]:
    """Add the ids to every log line of this context, until the block ends."""
    present = {name: str(value) for name, value in ids.items() if value is not None}
    token = _bound.set(tuple({**dict(_bound.get()), **present}.items()))
    try:
        yield
    finally:
        _bound.reset(token)


@contextmanager
def refusals_logged(log: logging.Logger) -> Iterator[None]:
    """Log a NibbleError as one line instead of a traceback, and exit with code 1."""
    try:
        yield
    except NibbleError as fault:
        log.error("%s [%s]: %s", fault.message, fault.code, fault.remedy)  # noqa: TRY400  # as promised
        raise SystemExit(1) from None


def bound_id(name: str) -> str | None:
    return dict(_bound.get()).get(name)


def ids_of(record: logging.LogRecord) -> dict[str, str]:
    """The ids of the context in which the line was written, and of the call itself."""
    own = {name: str(getattr(record, name)) for name in IDS if getattr(record, name, None) is not None}
    return {**dict(_bound.get()), **own}


def escaped(text: str) -> str:
    """The text without control characters, cut to a sane length."""
    return CONTROL.sub(shown, text)[:MAX_MESSAGE]


def shown(control: re.Match[str]) -> str:
    return f"\\x{ord(control[0]):02x}"


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        values = ids_of(record)
        ids = "".join(f" {name}={escaped(values[name])}" for name in IDS if name in values)
        line = f"{moment} {record.levelname} {record.name}: {escaped(record.getMessage())}{ids}"
        return f"{line}\n{indented(trace(record))}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escaped(record.getMessage()),
            **ids_of(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["trace"] = trace(record)
        return json.dumps(fields, default=str)


def trace(record: logging.LogRecord) -> str:
    assert record.exc_info
    return "".join(traceback.format_exception(*record.exc_info)).rstrip()[:MAX_TRACE]


def indented(text: str) -> str:
    """Indent each line, so that none looks like a log line: an error's text may come from outside."""
    return "\n".join("    " + CONTROL.sub(shown, line) for line in text.split("\n"))


def log_warnings() -> None:
    """Write warnings of libraries to the log. For the main of a process that runs models.

    No warning becomes an error, whatever PYTHONWARNINGS says: a deprecation must not end a running service.
    """
    logging.captureWarnings(True)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)  # as Python does by itself


def set_up_logs(settings: Settings) -> None:
    """Send every line to stderr in the operator's format. For the main of a process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    # Relayed requests have their line in the access log.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if settings.log_level != "debug":
        # Its maintenance writes four lines every half minute; the supervisor logs what a worker does.
        logging.getLogger("rq.worker").setLevel(logging.WARNING)
