"""The `nibble` command: assembles the commands, and turns errors into exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from app.commands import chat, discover, doctor, jobs, keys, quantize, serve, storage
from app.commands.artifacts import artifacts
from app.commands.deployments import deploy, deployments
from app.commands.terminal import report_error
from app.core.errors import NibbleError
from app.core.system_faults import system_fault

EPILOG = (
    "Exit codes: 0 done, 1 the job failed or the request was refused, 2 wrong usage, "
    "3 no service answers, 130 interrupted."
)

COMMANDS = (
    serve.up, serve.api, serve.worker,
    jobs.submit, jobs.watch, jobs.jobs, jobs.cancel, jobs.retry, jobs.events, jobs.report, jobs.estimate,
    jobs.workers,
    quantize.quantize, discover.discover, doctor.doctor, keys.login, deploy, chat.chat, storage.gc,
)  # fmt: skip


def show_version(asked: bool) -> None:
    if asked:
        from app.core.storage.reuse import package_version

        typer.echo(f"nibble {package_version()}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
]


def options(version: Version = False) -> None:
    """Quantize language models: run the service, or talk to one."""


def build() -> typer.Typer:
    nibble = typer.Typer(
        name="nibble",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    nibble.callback()(options)
    for command in COMMANDS:
        nibble.command()(command)
    nibble.add_typer(artifacts, name="artifacts")
    nibble.add_typer(deployments, name="deployments")
    nibble.add_typer(keys.keys, name="keys")
    return nibble


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Always ends with SystemExit; the codes are in `terminal.ExitCode`."""
    command_line = sys.argv[1:] if arguments is None else arguments
    try:
        build()(args=arguments, prog_name="nibble")
    except NibbleError as error:
        sys.exit(report_error(error, as_json="--json" in command_line))
    except OSError as error:
        fault = system_fault(error, error.filename or "the output folder")
        if fault is None:
            raise
        sys.exit(report_error(fault, as_json="--json" in command_line))


if __name__ == "__main__":
    main()
