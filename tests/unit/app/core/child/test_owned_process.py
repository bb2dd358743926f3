"""Owned processes as real small programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from app.core.child.owned_process import TAIL_LENGTH, OwnedProcess, exit_words
from app.core.child.start import PROGRAM
from tests.waiting import wait_until


def python(program: str) -> list[str]:
    return [PROGRAM, sys.executable, "-c", textwrap.dedent(program)]


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (7, "exit code 7"), (-9, "signal 9 (Killed)"), (-15, "signal 15 (Terminated)")],
)
def test_exits_in_words(code: int, words: str) -> None:
    assert exit_words(code) == words


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", -9), ("os.abort()", -6)],
)
def test_how_it_ended_is_seen_before_and_after_it_is_collected(end: str, code: int) -> None:
    with OwnedProcess(python(f"import os, sys; {end}")) as process:
        assert [process.wait(), process.exit_code(), process.wait(0)] == [code] * 3
        os.kill(process.pid, 0)  # still ours
    assert [process.wait(), process.exit_code()] == [code] * 2
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    process.stop(0)  # signals nobody


def test_a_running_process_has_no_exit_code_and_a_closed_one_was_killed() -> None:
    process = OwnedProcess(python("import time; time.sleep(600)"))
    assert (process.wait(0.05), process.has_ended(), process.is_closing) == (None, False, False)
    process.close()
    assert (process.exit_code(), process.has_ended(), process.is_closing) == (-9, True, True)


def test_each_line_of_its_output_is_heard_however_it_ends() -> None:
    program = r"""
    import os
    for written in (b"one\ntw", b"o\r\n\xc3", b"\xa4 \xff\n10 %\r20 %\r", b"", b"\n", b"the last"):
        os.write(1, written)
    os.write(2, b" and the error")
    """
    lines: list[str] = []
    with OwnedProcess(python(program), on_line=lines.append) as process:
        process.wait()
    assert lines == ["one", "two", "ä \N{REPLACEMENT CHARACTER}", "10 %", "20 %", "the last and the error"]
    assert (
        process.output_tail() == "one\ntwo\nä \N{REPLACEMENT CHARACTER}\n10 %\n20 %\nthe last and the error"
    )


def test_of_an_endless_line_the_end_is_kept() -> None:
    lines: list[str] = []
    program = f"print('x' * {3 * TAIL_LENGTH}, end='y')"
    with OwnedProcess(python(program), on_line=lines.append) as process:
        process.wait()
    assert lines == ["x" * (TAIL_LENGTH - 1) + "y"]
    assert process.output_tail() == lines[0]


def test_it_reads_its_input_and_need_not() -> None:
    content = bytes(4 * 1024**2)  # more than a pipe holds
    with OwnedProcess(python("import sys; print(len(sys.stdin.buffer.read()))"), stdin=content) as process:
        assert process.wait() == 0
    assert process.output_tail() == f"{len(content)}\n"
    with OwnedProcess(python("import sys; sys.exit(3)"), stdin=content) as process:
        assert process.wait() == 3
    with OwnedProcess(python("import sys; print(sys.stdin.read() == '')")) as process:
        assert process.wait() == 0
    assert process.output_tail() == "True\n"


@pytest.mark.parametrize(
    ("on_term", "code"), [("lambda *_: sys.exit(5)", 5), ("signal.SIG_IGN", -9), ("signal.SIG_DFL", -15)]
)
def test_it_is_asked_to_end_before_it_and_what_it_started_are_killed(on_term: str, code: int) -> None:
    lines: list[str] = []
    program = f"""
    import os, signal, sys, time
    if (other := os.fork()) == 0:
        signal.signal(signal.SIGTERM, lambda *_: print("it was asked, too", flush=True))
        time.sleep(600)
    signal.signal(signal.SIGTERM, {on_term})
    print(other, flush=True)
    time.sleep(600)
    """
    with OwnedProcess(python(program), on_line=lines.append) as process:
        wait_until(lambda: bool(lines))
        process.stop(0.3 if code == -9 else 30)
        assert process.wait() == code
    wait_until(lambda: not Path(f"/proc/{lines[0]}/exe").exists())
    assert lines[1:] == []


SLEEPER = """
import os, signal, sys, time
def asked(*_):
    open("asked", "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, asked)
os.write(int(os.environ["STARTED"]), b"%d" % os.getpid())
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("words", "is_asked"),
    [
        (["sleeper"], False),
        (["--confined", "sleeper"], False),
        ([PROGRAM, sys.executable, "-m", "sleeper"], True),  # it may have files to write
    ],
)
def test_it_dies_with_a_killed_parent(words: list[str], is_asked: bool, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    reading, writing = os.pipe()
    parent = (
        "import time\n"
        "from app.core.child.owned_process import OwnedProcess\n"
        f"process = OwnedProcess({words!r}, fds=({writing},))\n"
        "time.sleep(600)\n"
    )
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[5]}"
    environment = {**os.environ, "PYTHONPATH": path, "STARTED": str(writing)}
    with subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, pass_fds=(writing,), cwd=tmp_path
    ) as process:
        os.close(writing)
        pid = int(os.read(reading, 20))
        os.close(reading)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}/exe").exists())
    assert (tmp_path / "asked").exists() == is_asked
