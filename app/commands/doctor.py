"""`nibble doctor`: finds problems of this host and says how to fix them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from app.commands.checks.check import Check
from app.commands.checks.devices import check_devices, check_kernels
from app.commands.checks.host import (
    EXTRAS,
    check_cache,
    check_disk,
    check_extra,
    check_models,
    check_port,
    check_python,
    check_state,
)
from app.commands.checks.redis_checks import check_redis
from app.commands.checks.storage_checks import check_storage
from app.commands.terminal import AsJson, ExitCode, human_seconds, print_json, read_settings, stdout
from app.core.errors import InvalidRequest
from app.core.records.counted import counted

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


CompileKernels = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the usual CUDA kernels into the cache, too: a minute of processor time."
    ),
]


def doctor(*, as_json: AsJson = False, compile_kernels: CompileKernels = False) -> None:
    """Check this host: Python, PyTorch, GPUs, compilers, Redis, storage, disk, folders, port, clock.

    Each check is ok, a warning (it works, but not as well as it could) or a problem (something will not
    work). Exits with 1 if there is a problem.
    """
    console = stdout()
    checks = []
    news = CompilationNews(console, quiet=as_json)
    compiled = (news.compile() for _ in range(compile_kernels))  # after the others are shown
    for check in chain(every_check(), compiled):
        checks.append(check)
        if not as_json:
            show_check(console, check)
    problems = sum(check.status == "problem" for check in checks)
    if as_json:
        print_json(
            [
                {"name": check.name, "status": check.status, "found": check.finding, "remedy": check.remedy}
                for check in checks
            ]
        )
    else:
        warnings = sum(check.status == "warning" for check in checks)
        console.print(f"\n{counted(problems, 'problem')}, {counted(warnings, 'warning')}")
    if problems:
        raise typer.Exit(ExitCode.FAILED)


class CompilationNews:
    """Says which kernel is compiled, and how long those of each architecture took."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.began = 0.0

    def compile(self) -> Check:
        self.began = time.monotonic()
        if self.quiet:
            return check_kernels(lambda kernel: None)
        with self.console.status("CUDA kernels: looking for a compiler") as self.status:
            return check_kernels(self.hear)

    def hear(self, kernel: Mapping[str, Any]) -> None:
        now, name = time.monotonic(), kernel["architecture"]
        last = f"{kernel['source']} in {human_seconds(kernel['seconds'])}"
        self.status.update(f"CUDA kernels for {name}: {kernel['done']} of {kernel['of']}, {last}")
        if kernel["done"] == kernel["of"]:
            spent = human_seconds(now - self.began)
            self.console.print(f"{'compiled':<8} {name:<18} {counted(kernel['of'], 'kernel')} in {spent}")
            self.began = now


def every_check() -> Iterator[Check]:
    """Every check, in the order in which problems should be fixed."""
    yield check_python()
    yield from (check_extra(name) for name in EXTRAS)
    yield from check_devices()
    try:
        settings = read_settings()
    except InvalidRequest as fault:
        yield Check("settings", "problem", fault.message, fault.remedy)
        return
    yield Check("settings", "ok", "every NIBBLE_* variable can be read")
    yield check_state(settings)
    yield check_cache(settings)
    yield check_disk(settings)
    yield check_models(settings)
    yield from check_redis(settings)
    yield check_storage(settings)
    yield check_port(settings)


def show_check(console: Console, check: Check) -> None:
    colour = COLOURS[check.status]
    console.print(f"[{colour}]{check.status:<8}[/] {escape(check.name):<18} {escape(check.finding)}")
    if check.remedy:
        word = "hint" if check.status == "ok" else "remedy"
        console.print(f"{'':<8} [bold]{word:<18}[/] {escape(check.remedy)}")
