from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.core.child.assignment import Assignment, Progressed
from app.core.child.confinement import MAX_FILE_BYTES, child_environment
from app.core.child.job_child import MAX_LINE_BYTES, JobChild, exit_fault, parse_message
from app.core.child.owned_process import TAIL_LENGTH, count_oom_kills
from app.core.errors import JobFault, OutOfMemory
from app.core.records.specs import JobSpec

Start = Callable[[str], JobChild]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a child whose program is given."""
    work_folder = tmp_path / "work"
    work_folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[4]}")
    assignment = Assignment(
        spec=JobSpec(model="org/name"),
        model_folder=tmp_path,
        model_name="name",
        model_digest="0",
        calibration_digest="0",
        work_folder=work_folder,
    )

    def run(program: str) -> JobChild:
        preamble = "import os, signal, sys, time\nfd = int(sys.argv[sys.argv.index('--progress-fd') + 1])\n"
        (tmp_path / "program.py").write_text(preamble + textwrap.dedent(program))
        return JobChild(assignment, module="program")

    return run


def test_messages_arrive_whole_and_in_order(start: Start) -> None:
    program = """
    line = b'{"kind": "progress", "fraction": 0.5, "layer": %d}\\n'
    text = b"".join(line % number for number in range(3))
    for byte in range(len(text)):
        os.write(fd, text[byte:byte + 1])
    """
    with start(program) as child:
        assert list(child.messages()) == [Progressed(fraction=0.5, layer=number) for number in range(3)]


def test_the_assignment_comes_on_stdin(start: Start) -> None:
    with start("print(sys.stdin.read())") as child:
        assert list(child.messages()) == []
        child.wait_fault(10)
        assert '"model":"org/name"' in child.output_tail()


def test_only_the_end_of_a_long_output_is_kept(start: Start) -> None:
    with start("print('x' * 200_000); print('the end')") as child:
        list(child.messages())
        child.wait_fault(10)
        tail = child.output_tail()
    assert len(tail) == TAIL_LENGTH
    assert tail.endswith("the end\n")


def test_a_line_without_end_is_refused(start: Start) -> None:
    program = f"for _ in range({2 * MAX_LINE_BYTES // 65536}): os.write(fd, b'x' * 65536)"
    with start(program) as child, pytest.raises(JobFault) as fault:
        list(child.messages())
    assert fault.value.code == "child_protocol"


def test_an_exit_is_explained(start: Start) -> None:
    with start("sys.exit(7)") as child:
        assert list(child.messages()) == []
        fault = child.wait_fault(10)
    assert fault.code == "child_crashed"
    assert "exit code 7" in fault.message


def test_a_child_that_closes_its_pipe_and_goes_on_is_ended(start: Start) -> None:
    with start("os.close(fd); time.sleep(600)") as child:
        assert list(child.messages()) == []
        assert child.wait_fault(0.1).code == "child_protocol"


def test_a_child_that_is_just_being_collected_has_ended(start: Start) -> None:
    with start("sys.exit(0)") as child:
        os.waitpid(child.pid, 0)  # as `close` does, in another thread than the one that stops the child
        assert child.has_ended()


def test_stop_lets_a_child_end_itself(start: Start) -> None:
    program = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.write(fd, b'{"kind": "progress", "fraction": 0}\\n')
    time.sleep(600)
    """
    with start(program) as child:
        next(child.messages())
        child.stop(10)
        assert "143" in child.wait_fault(10).message


def test_stop_kills_a_deaf_child_and_its_children(start: Start) -> None:
    program = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() > 0:
        os.write(fd, b'{"kind": "progress", "fraction": 0}\\n')
    time.sleep(600)
    """
    with start(program) as child:
        group = child.pid
        next(child.messages())
        child.stop(0.1)
        assert "signal 9" in child.wait_fault(10).message
    assert_group_ends(group)


def assert_group_ends(group: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("the process group lives on")


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed; what it started through `start` must go too."""
    program = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(20); print('outlived')"
    (tmp_path / "sleeper.py").write_text(program)
    parent_program = (
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'app.core.child.start', str(os.getpid()), 'sleeper'])"
    )
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[4]}"
    with subprocess.Popen(
        [sys.executable, "-c", parent_program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert parent.stdout.read() == ""  # the pipe ends when the child, too, is gone


def test_a_child_whose_parent_is_gone_does_not_start() -> None:
    command = [sys.executable, "-m", "app.core.child.start", "1", "this.module.does.not.exist"]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[4]).returncode == 143


def test_the_environment_is_an_allow_list(tmp_path: Path) -> None:
    seen = child_environment(
        {"PATH": "p", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000",
         "NIBBLE_REDIS_URL": "r", "AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "t", "TMPDIR": "/tmp"},
        tmp_path,
    )  # fmt: skip
    assert seen == {
        "PATH": "p",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "1000",
        "OMP_WAIT_POLICY": "passive",
        "TMPDIR": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    assert child_environment({"OMP_WAIT_POLICY": "active"}, tmp_path)["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize(
    ("code", "oom_killed", "expected"),
    [
        (-9, True, "out_of_memory"),
        (-9, False, "child_killed"),
        (-11, True, "child_crashed"),
        (1, True, "child_crashed"),
    ],
)
def test_exits_are_classified(code: int, oom_killed: bool, expected: str) -> None:
    fault = exit_fault(code, oom_killed=oom_killed)
    assert fault.code == expected
    assert isinstance(fault, OutOfMemory) == (expected == "out_of_memory")
    assert fault.remedy


def test_oom_kills_are_counted() -> None:
    assert count_oom_kills() >= 0


def test_an_unknown_message_is_refused() -> None:
    with pytest.raises(JobFault):
        parse_message(b'{"kind": "greeting"}')


def test_a_childs_files_have_a_most_of_bytes(start: Start) -> None:
    with start("import resource; print(resource.getrlimit(resource.RLIMIT_FSIZE)[1])") as child:
        assert list(child.messages()) == []
        child.wait_fault(10)
        assert 0 < int(child.output_tail()) <= MAX_FILE_BYTES


def test_a_child_has_no_network_and_no_way_to_more_rights(start: Start) -> None:
    program = """
    import resource, socket
    found = []
    for address in [("127.0.0.1", int(os.environ["PYTHON_PORT"])), ("192.0.2.1", 80)]:
        try:
            socket.create_connection(address, timeout=2)
            found.append("connected")
        except OSError as fault:
            found.append(type(fault).__name__)
    status = open("/proc/self/status").read()
    found.append("NoNewPrivs:\\t1" in status)
    found.append(resource.getrlimit(resource.RLIMIT_CORE)[1])
    found.append(os.environ["NIBBLE_CHILD_NETWORK"])
    print(found, os.getppid() > 0)
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.environ["PYTHON_PORT"] = str(listener.getsockname()[1])
        with start(program) as child:
            assert list(child.messages()) == []
            child.wait_fault(10)
            told = child.output_tail()
    assert "NoNewPrivs" not in told
    if "'on'" in told:
        pytest.skip("this kernel lets no process leave its network")
    assert told.strip() == "['ConnectionRefusedError', 'OSError', True, 0, 'off'] True"
