from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from app.core.errors import Unavailable
from app.core.telemetry.logs import JsonFormatter, TextFormatter, bound_id, log_ids, refusals_logged


def line(message: str, *, fault: bool = False, **extra: object) -> logging.LogRecord:
    trouble = None
    if fault:
        try:
            int("bad\nvalue")
        except ValueError:
            trouble = sys.exc_info()
    record = logging.LogRecord("app", logging.INFO, __file__, 1, message, (), trouble)
    record.__dict__.update(extra)
    return record


def test_a_line_carries_the_ids_of_its_context_and_its_own() -> None:
    with log_ids(request="r1", job=None):
        assert bound_id("request") == "r1"
        with log_ids(job="j1", attempt=2):
            told = json.loads(JsonFormatter().format(line("hello", attempt=3, fields={"status": 200})))
        assert bound_id("job") is None
    assert (told["request"], told["job"], told["attempt"], told["status"]) == ("r1", "j1", "3", 200)
    assert (told["message"], told["level"], told["logger"]) == ("hello", "info", "app")
    assert bound_id("request") is None


def test_nothing_from_outside_begins_a_line_of_its_own() -> None:
    forged = "GET /x\n2026-01-01 INFO app: forged\x1b[2J\u2028end"
    with log_ids(request="a\nb"):
        text = TextFormatter().format(line(forged))
        document = JsonFormatter().format(line(forged))
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    assert len(document.splitlines()) == 1
    assert "request=a\\x0ab" in text


def test_an_errors_text_begins_no_line_of_its_own() -> None:
    def fail() -> None:
        raise ValueError("x\n2026-01-01 INFO app: forged\r\x1b[2J" + "y" * 100_000)

    try:
        fail()
    except ValueError:
        fault = logging.LogRecord("app", logging.ERROR, "f", 1, "broke", None, sys.exc_info())
    first, *rest = TextFormatter().format(fault).split("\n")
    assert first.endswith("broke")
    assert any("forged" in each for each in rest)
    assert all(each.startswith("    ") and "\r" not in each and "\x1b" not in each for each in rest)
    assert len(JsonFormatter().format(fault)) < 60_000


def test_a_fault_comes_with_its_trace_and_length_is_bounded() -> None:
    assert "ValueError" in json.loads(JsonFormatter().format(line("x", fault=True)))["trace"]
    assert "ValueError" in TextFormatter().format(line("x", fault=True))
    assert len(TextFormatter().format(line("x" * 100_000))) < 10_000


def test_a_refusal_is_one_line_and_an_exit_code(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended, refusals_logged(logging.getLogger("worker")):
        raise Unavailable("no Redis", code="redis_missing", remedy="start one")
    assert ended.value.code == 1
    (record,) = caplog.records
    assert (record.getMessage(), record.exc_info) == ("no Redis [redis_missing]: start one", None)


@pytest.mark.parametrize("category", ["UserWarning", "FutureWarning", "RuntimeWarning"])
def test_a_warning_is_a_line_even_where_warnings_are_errors(category: str) -> None:
    program = (
        "import logging, warnings; from app.core.telemetry.logs import log_warnings; logging.basicConfig();"
        f"log_warnings(); warnings.warn('renamed', {category}); print('went on')"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "went on\n"
    assert f"{category}: renamed" in done.stderr
