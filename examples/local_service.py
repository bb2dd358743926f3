"""A service for the programs beside this file: `nibble up` on a free port, stopped at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from app.client import NibbleClient
from app.commands.terminal import ExitCode, console_on, report_error
from app.core.access.api_keys import KEY_FILE
from app.core.errors import NibbleError

REPOSITORY = Path(__file__).resolve().parent.parent
START_LIMIT_S = 210.0  # what `nibble up` allows itself, and a little
STOP_LIMIT_S = 40.0


class DemoFailed(Exception):
    """Something did not go as the program promises."""


def free_port(preferred: int = 0) -> int:
    """`preferred` if nobody listens there, else one that the system chooses."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoFailed("no TCP port of 127.0.0.1 is free")


def service_environment(state: Path, port: int, models: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIBBLE_")}
    return {
        **kept,
        "NIBBLE_STATE_DIR": str(state),
        "NIBBLE_HOST": "127.0.0.1",
        "NIBBLE_PORT": str(port),
        "NIBBLE_MODEL_ROOTS": str(models),
    }


@contextmanager
def running_service(state: Path, port: int, models: Path) -> Iterator[NibbleClient]:
    """`nibble up`, ready, with a client; stopped at the end together with all that it started.

    `models` is the folder from which models may be read.
    """
    log = state.parent / "nibble-up.log"
    command = [sys.executable, "-m", "app.core.child.start", str(os.getpid()), "app.cli", "up"]
    with log.open("wb") as out:
        service = subprocess.Popen(
            command, cwd=REPOSITORY, env=service_environment(state, port, models), stdout=out, stderr=out,
            # Ctrl-C is for this program, which stops the service when it ends.
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        await_ready(url, service)
        with NibbleClient(url, api_key=(state / KEY_FILE).read_text().strip()) as client:
            yield client
    except (DemoFailed, NibbleError, OSError):
        sys.stderr.write(log.read_text(errors="replace"))
        raise
    finally:
        stop(service)


def await_ready(url: str, service: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    with NibbleClient(url) as client:
        while not client.ready():
            if service.poll() is not None:
                raise DemoFailed(f"`nibble up` ended with exit code {service.returncode}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"the service was not ready after {START_LIMIT_S:.0f} s")
            time.sleep(0.1)


def stop(service: subprocess.Popen[bytes]) -> None:
    service.terminate()
    try:
        service.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()


def ended(run: Callable[[Console], None]) -> int:
    """Run a program of this folder; its exit code. However it ends, its service stops and its folder goes."""
    console = console_on(stderr=False)
    signal.signal(signal.SIGTERM, exit_on_signal)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
    try:
        run(console)
    except DemoFailed as fault:
        console.print(f"[bold red]it failed:[/] {escape(str(fault))}")
        return ExitCode.FAILED
    except NibbleError as fault:
        return report_error(fault)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return ExitCode.OK


def exit_on_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
