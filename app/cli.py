"""The `nibble` command: names the commands, which are imported on use, and turns errors into exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from app.commands.help_pages import HELP_OPTIONS, CommandsOnUse, Entry, HelpfulGroup
from app.core.errors import NibbleError

EXIT_CODES = (
    "Exit codes: 0 done, 1 the job failed or the request was refused, 2 wrong usage, "
    "3 no service answers, 130 interrupted."
)

# Every command under its heading. The summaries stand here, too, so that `nibble --help` imports no command.
SECTIONS: dict[str, dict[str, Entry]] = {
    "Run the service": {
        "up": Entry("serve:up", "Run the whole service on this machine."),
        "open": Entry("opening:open_dashboard", "Open the dashboard, or a page of it, in the browser."),
        "doctor": Entry("doctor:doctor", "Check this host: PyTorch, GPUs, Redis, storage, disk."),
        "api": Entry("serve:api", "Run only the HTTP API."),
        "worker": Entry("serve:worker", "Run one worker."),
    },
    "Quantize": {
        "submit": Entry("jobs:submit", "Submit a job: quantize a model."),
        "estimate": Entry("jobs:estimate", "Predict a job's time, memory and size without running it."),
        "recommend": Entry("recommend:recommend", "Name a recipe for a model and the device that serves it."),
        "quantize": Entry("quantize:quantize", "Quantize a model on this machine, without a service."),
        "discover": Entry("discover:discover", "Find out how a model's layers hang together, by tracing."),
    },
    "Texts": {
        "datasets": Entry("uploads:datasets", "Upload, list, show and delete texts of your own."),
    },
    "Jobs": {
        "jobs": Entry("jobs:jobs", "List jobs, newest first."),
        "watch": Entry("jobs:watch", "Show a job's progress until it ends."),
        "logs": Entry("jobs:logs", "Print what a job did and what its process wrote."),
        "events": Entry("jobs:events", "Show a job's events, past and future, until it ends."),
        "report": Entry("jobs:report", "Show what a job has won: sizes, quality, seconds."),
        "compare": Entry("comparison:compare", "Compare jobs and artifacts with their originals."),
        "export": Entry("jobs:export", "Print a job's figures as flat JSON, for experiment trackers."),
        "cancel": Entry("jobs:cancel", "Cancel a queued or running job."),
        "retry": Entry("jobs:retry", "Run an ended job again, as a new job."),
    },
    "Results": {
        "artifacts": Entry("artifacts:artifacts", "List, show, download, share and delete artifacts."),
        "registry": Entry("pushes:registry", "List what was made of each model, with tags and pushes."),
        "tag": Entry("pushes:tag", "Give tags to an artifact."),
        "push": Entry("pushes:push", "Push an artifact to the hub, with a model card."),
    },
    "Serve": {
        "deploy": Entry("deployments:deploy", "Serve an artifact with OpenAI's API."),
        "deployments": Entry("deployments:deployments", "List, show, change and delete deployments."),
        "chat": Entry("chat:chat", "Chat with a deployment."),
    },
    "Operate": {
        "workers": Entry("jobs:workers", "List the live workers with their host, device and status."),
        "login": Entry("keys:login", "Print a link that logs a browser in, once."),
        "keys": Entry("keys:keys", "Create, list and revoke API keys."),
        "limits": Entry("administration:limits", "Show or set a tenant's limits, and what it uses."),
        "audit": Entry("administration:audit", "List changes: who did what, newest first."),
        "webhooks": Entry("deliveries:webhooks", "List and repeat webhooks; show their secret."),
        "gc": Entry("storage:gc", "Remove unreferenced data."),
    },
    "Help": {
        "help": Entry("help_command:help_page", "Show the help of a command."),
    },
}  # fmt: skip
ENTRIES = {name: entry for entries in SECTIONS.values() for name, entry in entries.items()}


class Nibble(HelpfulGroup):
    """The root. Reads SECTIONS for its help, and imports a command when it is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = CommandsOnUse(ENTRIES)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(ENTRIES)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, entries in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<11}", entry.summary) for name, entry in entries.items()])


def show_version(asked: bool) -> None:
    if asked:
        from app.core.telemetry.version import package_version

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
        cls=Nibble,
        epilog=EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=HELP_OPTIONS,
    )
    nibble.callback()(options)
    return nibble


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Always ends with SystemExit; the codes are in `terminal.ExitCode`."""
    try:
        build()(args=arguments, prog_name="nibble")
    except NibbleError as error:
        end(error, arguments)
    except OSError as error:
        from app.core.faults.system_faults import system_fault

        fault = system_fault(error, error.filename or "the output folder")
        if fault is None:
            raise
        end(fault, arguments)


def end(error: NibbleError, arguments: list[str] | None) -> None:
    from app.commands.terminal import report_error

    command_line = sys.argv[1:] if arguments is None else arguments
    sys.exit(report_error(error, as_json="--json" in command_line, typed=command_line))


if __name__ == "__main__":
    main()
