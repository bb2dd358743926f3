"""What `nibble up` prints: a box with the link, what it is busy with, and of its processes the warnings."""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.markup import escape

from app.commands.terminal import print_json, stdout
from app.core.planning.device_profile import MEASURING_LIMIT_S

if TYPE_CHECKING:
    from rich.status import Status

    from app.core.jobs.worker_registry import WorkerRecord

COLOURS = ("cyan", "green", "magenta", "yellow", "blue")
# Lines of our logs, as text or JSON, that say nothing to worry about.
UNWORRIED = re.compile(r'^\d{4}-\S+ (DEBUG|INFO) |"level": ?"(debug|info)"')
TAIL = 40  # lines of a process that are kept for its end


class Voice:
    """Formats lines: after the name of their process, or as JSON."""

    def __init__(self, *, as_json: bool, verbose: bool = False) -> None:
        self.as_json = as_json
        self.verbose = verbose or as_json
        self.console = stdout()
        self.colours: dict[str, str] = {}
        self.hidden: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=TAIL))
        self.status: Status | None = None

    def say(self, name: str, line: str, *, style: str = "", **facts: str) -> None:
        """Print a line; with --json also `facts`."""
        if self.as_json:
            print_json({"from": name, **facts, "line": line})
            return
        colour = self.colours.setdefault(name, COLOURS[len(self.colours) % len(COLOURS)])
        text = f"[{style}]{escape(line)}[/]" if style else escape(line)
        self.console.print(f"[{colour}]{name:<8} |[/] {text}")

    def hear(self, name: str, line: str) -> None:
        """A process has written a line: print it if it is a warning or worse, or is asked for."""
        if self.verbose or not UNWORRIED.search(line):
            self.say(name, line)
        else:
            self.hidden[name].append(line)

    def show_tail(self, name: str) -> None:
        """Print what a process that has ended wrote last."""
        while self.hidden[name]:
            self.say(name, self.hidden[name].popleft())

    def show_busy(self, text: str) -> None:
        """Say what is being waited for: on a terminal in one line that changes."""
        if self.as_json:
            return
        if not self.console.is_terminal:
            self.console.print(escape(text))
        elif self.status is None:
            self.status = self.console.status(escape(text))
            self.status.start()
        else:
            self.status.update(escape(text))

    def end_busy(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None

    def show_ready(self, url: str, link: str, key: str, models: str) -> None:
        """The box: where the service is, and how to begin. Links stand in lines of their own, for copying."""
        self.end_busy()
        self.console.rule(f"[bold green]Nibble is ready at {escape(url)}")
        for line in (
            f"[bold]{escape(link)}[/]",
            "open it in a browser to sign in; it works once, within ten minutes",
            "",
            f"API key  {escape(key)}",
            f"models   {escape(models)}",
            "try      nibble submit MODEL --watch, in another terminal",
            "stop     Ctrl-C",
        ):
            self.console.print(f"  {line}".rstrip(), soft_wrap=True)
        self.console.rule()


class MeasuringNews:
    """Says how long the devices are being measured, which happens once, and that it is done."""

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        self.began: float | None = None

    def look(self, workers: Iterable[WorkerRecord]) -> None:
        """To be called every second or so."""
        devices = sorted({worker.device_name or worker.device for worker in workers if worker.measuring})
        if devices:
            is_new = self.began is None
            self.began = self.began or time.monotonic()
            if is_new or self.voice.console.is_terminal:
                spent = time.monotonic() - self.began
                limit = f"{spent:.0f} s of at most {MEASURING_LIMIT_S:.0f} s"
                self.voice.show_busy(f"measuring {', '.join(devices)} once, for estimates: {limit}")
        elif self.began is not None:
            self.voice.end_busy()
            self.voice.say("nibble", f"measured in {time.monotonic() - self.began:.0f} s")
            self.began = None
