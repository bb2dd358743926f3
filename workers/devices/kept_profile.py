"""The device's rates: measured while a worker is idle, kept for all of a host. Without torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import socket
import time
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError

from app.core.child.owned_process import OwnedProcess, exit_words
from app.core.planning.device_profile import (
    MEASURING_LIMIT_S,
    DeviceKind,
    DeviceProfile,
    profile_of,
    rate_names,
)

log = logging.getLogger(__name__)

MODULE = "workers.devices.profile_measurement"
RATES: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, float])
QUIET = 0.25  # of the host's processors may be used by others while rates are measured that are kept


class Measurement:
    """Measures what this host does not know of a device yet, in a process of its own.

    A worker calls `go_on` while it is idle and `pause` before it works. A rate that was being measured then
    is begun anew; after `MEASURING_LIMIT_S` seconds in all, those that are missing stay assumed.
    """

    def __init__(
        self, device: str, device_name: str, folder: Path, *, limit_s: float = MEASURING_LIMIT_S
    ) -> None:
        """`folder` is where jobs write: its disk is measured."""
        self._device, self._folder = device, folder
        self._kind: DeviceKind = "cpu" if device == "cpu" else "cuda"
        self._path = profiles_folder(folder) / (
            f"{device.replace(':', '')}-{circumstances(device_name, folder)}.json"
        )
        self._rates: dict[str, float] = {}
        with contextlib.suppress(OSError, ValidationError):
            self._rates = RATES.validate_json(self._path.read_text("utf-8"))
        self._limit_s = self._left_s = limit_s
        self._process: OwnedProcess | None = None
        self._began = 0.0
        self._others, self._was_quiet = OthersUse(), True
        self.is_over = not self.missing

    @property
    def missing(self) -> list[str]:
        return [name for name in rate_names(self._kind) if name not in self._rates]

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def profile(self) -> DeviceProfile | None:
        """None as long as nothing is measured."""
        return profile_of(self._kind, self._rates) if self._rates else None

    def go_on(self) -> None:
        """Measure on, or end it: when all is measured, the time is up or the device can't be measured.

        To be called every second or so, from a thread that lives as long as the process.
        """
        if self.is_over:
            return
        if self._process is None:
            self._start()
            return
        code = self._process.exit_code()
        if code is None and time.monotonic() - self._began < self._left_s:
            return
        tail = self._process.output_tail()
        self.pause()
        self.is_over = True
        if code:
            last = (tail.strip().splitlines() or [exit_words(code)])[-1]
            log.warning("%s could not be measured; estimates use nominal rates: %s", self._device, last)
        elif self.missing:
            log.warning(
                "%s: %.0f s were not enough to measure all rates; these are assumed: %s",
                self._device, self._limit_s, ", ".join(self.missing),
            )  # fmt: skip
        else:
            log.info("%s is measured; kept in %s", self._device, self._path)

    def pause(self) -> None:
        """Stop measuring within a moment; on a host that was quiet all the time, keep what was measured."""
        if self._process is None:
            return
        self._process.close()
        self._process = None
        self._left_s -= time.monotonic() - self._began
        share = self._others.share()
        if share > QUIET:
            self._was_quiet = False  # the rates of later rounds lie among these
            log.info(
                "%s was measured while others used %.0f %% of this host: this worker alone reckons with it",
                self._device, 100 * share,
            )  # fmt: skip
        if self._was_quiet:
            self._keep()

    def _start(self) -> None:
        log.info("measuring %s while no job waits, at most %.0f s", self._device, self._left_s)
        self._began = time.monotonic()
        self._others = OthersUse()
        skipped = [word for name in self._rates for word in ("--skip", name)]
        words = [MODULE, "--device", self._device, "--folder", str(self._folder), *skipped]
        self._process = OwnedProcess(words, on_line=self._take_in)

    def _take_in(self, line: str) -> None:
        """A line of its output, which warnings of libraries may be as well."""
        with contextlib.suppress(ValidationError):
            self._rates = {**self._rates, **RATES.validate_json(line)}

    def _keep(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside = self._path.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps(self._rates) + "\n", "utf-8")
            os.replace(aside, self._path)
        except OSError as fault:
            log.warning("the rates of %s can't be kept in %s: %s", self._device, self._path.parent, fault)


class OthersUse:
    """How much of the host others use than the children of this process that have ended meanwhile."""

    def __init__(self) -> None:
        self._began, self._used = time.monotonic(), self._seconds()

    def share(self) -> float:
        """Of all processors, since this was made."""
        elapsed = (time.monotonic() - self._began) * (psutil.cpu_count() or 1)
        return max(0.0, self._seconds() - self._used) / max(elapsed, 1e-3)

    @staticmethod
    def _seconds() -> float:
        host, own = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        idle = host.idle + getattr(host, "iowait", 0.0)
        guests = getattr(host, "guest", 0.0) + getattr(host, "guest_nice", 0.0)  # counted as user, too
        return float(sum(host) - idle - guests - own.ru_utime - own.ru_stime)


def profiles_folder(homeless: Path) -> Path:
    """In the user's cache, or below `homeless` for a user without a home, as containers have them."""
    try:
        return Path.home() / ".cache" / "nibble" / "profiles"
    except RuntimeError:
        return homeless / "profiles"


def circumstances(device_name: str, folder: Path) -> str:
    """A short digest of the host, device, threads, disk and versions that rates depend on."""
    facts = (
        socket.gethostname(), device_name, os.environ.get("OMP_NUM_THREADS", ""), str(folder.stat().st_dev),
        version("nibble"), version("torch"),
    )  # fmt: skip
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
