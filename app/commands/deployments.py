"""Commands about deployments: deploy, list, show, scale, pause, replace, rename, delete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from app.commands.help_pages import CommandGroup
from app.commands.lists import print_page
from app.commands.option_groups import among, option, without_none
from app.commands.short_ids import ArtifactId, artifact_id, deployment_of, require_own
from app.commands.show import print_answer
from app.commands.terminal import (
    After,
    Limit,
    Service,
    Yes,
    confirm,
    print_json,
    stdout,
    table,
)
from app.core.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import DeploymentAnswer, NibbleClient
    from app.core.records.job import Problem

deployments = CommandGroup("List, show, change and delete deployments.")

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A deployment's name, its id, the start of it, or `last`.")
]

Original = Annotated[
    bool, typer.Option("--original", help="The model that it was made of, unquantized: the baseline.")
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is ready.")]
Until = Callable[["DeploymentAnswer"], bool]
OF_VLLM = ("tensor_parallel_size", "pipeline_parallel_size")
UNSERVED = ("paused", "stopped")  # states in which no server is to come


@dataclass(frozen=True)
class Servers:
    """What serves: fields of a deployment's body, or of its `vllm`; None is left out."""

    engine: Annotated[
        str,
        typer.Option(
            help="auto, transformers or vllm.", autocompletion=among("auto", "transformers", "vllm")
        ),
    ] = "auto"
    replicas: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="Number of servers.")] = 1
    aliases: Annotated[list[str] | None, option("Another name; repeatable.", "--alias", metavar="NAME")] = (
        None
    )
    dtype: Annotated[
        str | None,
        option(
            "Data type of computation and cache: float16, bfloat16, float32.",
            values=("auto", "float16", "bfloat16", "float32"),
        ),
    ] = None
    max_model_len: Annotated[
        int | None, option("Longest prompt with its answer.", metavar="TOKENS", least=1)
    ] = None
    max_num_seqs: Annotated[
        int | None, option("Requests served at the same time; others wait.", metavar="N", least=1)
    ] = None
    cache_share: Annotated[
        float | None,
        option("transformers: the cache's share of free memory, such as 0.5.", metavar="SHARE"),
    ] = None
    idle_timeout_s: Annotated[
        int | None, option("Unload after this long without a request.", "--idle-timeout", metavar="SECONDS")
    ] = None
    tensor_parallel_size: Annotated[int | None, option("vllm: GPUs per layer.", metavar="N")] = None
    pipeline_parallel_size: Annotated[
        int | None, option("vllm: pipeline stages, one per GPU.", metavar="N")
    ] = None

    def body(self) -> dict[str, Any]:
        options = without_none(asdict(self))
        vllm = {name: options.pop(name) for name in OF_VLLM if name in options}
        return {**options, "vllm": vllm} if vllm else options


def deploy(
    artifact: ArtifactId,
    *,
    name: Annotated[str, typer.Option("--name", "-n", help="The model's name in requests.")],
    original: Original = False,
    servers: Servers,
    wait: Wait = True,
    service: Service,
) -> None:
    """Serve an artifact with OpenAI's API."""
    with service.connect() as client:
        body = {"artifact": artifact_id(client, artifact), "name": name, **servers.body()}
        if original:
            body["original"] = True
        deployment = client.deploy(body)
        if wait:
            deployment = await_change(
                client, deployment, service.console, quiet=service.as_json, until=is_ready
            )
        print_answer(deployment, show_deployment, as_json=service.as_json)
        if not service.as_json:
            stdout().print(f"\nchat with it: [bold]nibble chat {escape(name)}[/]")


def is_ready(each: DeploymentAnswer) -> bool:
    return each.state == "ready"


def is_replaced(each: DeploymentAnswer) -> bool:
    """Whether the new artifact serves, or will where none serves now."""
    return each.replacement is None and each.state in ("ready", *UNSERVED)


def ready_servers(each: DeploymentAnswer) -> int:
    return sum(server.state == "ready" for server in each.servers)


def await_change(
    client: NibbleClient, deployment: DeploymentAnswer, console: Console, *, quiet: bool, until: Until
) -> DeploymentAnswer:
    """Wait until the deployment is so, and show its status. Raises Unavailable if it fails."""
    shown = ""
    with (
        console.status(f"starting {escape(deployment.name)}") as status,
        closing(client.follow_deployment(deployment.id)) as changes,
    ):
        for deployment in changes:
            if until(deployment) or deployment.state not in ("starting", "ready") or failure(deployment):
                break
            if deployment.reason != shown and not quiet:
                shown = deployment.reason
                status.update(escape(shown))
                if not console.is_terminal:
                    console.print(escape(shown))
    if until(deployment):
        return deployment
    error = failure(deployment)
    if error is None:
        raise Unavailable(
            f"{deployment.name} is {deployment.state}: {deployment.reason}", code="deployment_not_ready"
        )
    raise Unavailable(error.message, code=error.code, remedy=error.remedy)


def failure(each: DeploymentAnswer) -> Problem | None:
    """Why it can't be served, or can't be replaced."""
    return each.error or (None if each.replacement is None else each.replacement.error)


@deployments.callback()
def list_deployments(
    context: typer.Context,
    *,
    limit: Limit = 20,
    after: After = None,
    service: Service,
) -> None:
    """List deployments, newest first."""
    if context.invoked_subcommand is not None:
        return
    with service.connect() as client:
        page = client.deployments(limit=limit, after=after)
    print_page(page, show_deployments, context, as_json=service.as_json)


@deployments.command()
def show(name: Name, *, service: Service) -> None:
    """Show a deployment and its servers."""
    with service.connect() as client:
        deployment = deployment_of(client, name)
    print_answer(deployment, show_deployment, as_json=service.as_json)


@deployments.command()
def delete(name: Name, *, yes: Yes = False, service: Service) -> None:
    """Delete a deployment: it finishes running requests, then stops."""
    with service.connect() as client:
        deployment = deployment_of(client, name)
        confirm(f"delete the deployment {deployment.name}?", yes=yes)
        with service.console.status(f"{escape(deployment.name)} is finishing its requests"):
            client.delete_deployment(deployment.id, wait=True)
    if service.as_json:
        print_json({"id": deployment.id, "name": deployment.name, "deleted": True})
    else:
        stdout().print(f"{escape(deployment.name)} is deleted")


def change(name: str, changes: dict[str, Any], service: Service, *, until: Until | None = None) -> None:
    """Change a deployment, wait until it is so, and show it."""
    with service.connect() as client:
        deployment = client.change_deployment(deployment_of(client, name).id, changes)
        if until is not None:
            console, quiet = service.console, service.as_json
            deployment = await_change(client, deployment, console, quiet=quiet, until=until)
    print_answer(deployment, show_deployment, as_json=service.as_json)


@deployments.command()
def scale(
    name: Name,
    replicas: Annotated[int, typer.Argument(metavar="N", min=1, max=16, help="Number of servers.")],
    *,
    wait: Wait = True,
    service: Service,
) -> None:
    """Serve with more or fewer servers; those that go finish their requests."""

    def is_scaled(each: DeploymentAnswer) -> bool:
        return each.state in UNSERVED or ready_servers(each) == len(each.servers) == replicas

    change(name, {"replicas": replicas}, service, until=is_scaled if wait else None)


@deployments.command()
def pause(name: Name, *, service: Service) -> None:
    """Stop a deployment's servers until you resume it; its name stays."""
    change(name, {"paused": True}, service)


@deployments.command()
def resume(name: Name, *, wait: Wait = True, service: Service) -> None:
    """Start a paused deployment again, or one that failed."""
    change(name, {"paused": False}, service, until=is_ready if wait else None)


@deployments.command()
def replace(
    name: Name,
    artifact: ArtifactId,
    *,
    original: Original = False,
    wait: Wait = True,
    service: Service,
) -> None:
    """Serve another artifact under the same name, without a gap.

    New servers start beside the old ones, which end as the new ones are ready.
    """
    with service.connect() as client:
        chosen = {"artifact": artifact_id(client, artifact), "original": original}
    change(name, chosen, service, until=is_replaced if wait else None)


@deployments.command()
def alias(
    name: Name,
    aliases: Annotated[list[str], typer.Argument(metavar="ALIAS...", help="Additional names.")],
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Remove these names.")] = False,
    service: Service,
) -> None:
    """Give a deployment further names, which requests may use, or take some away."""
    with service.connect() as client:
        before = deployment_of(client, name)
        if remove:
            require_own(aliases, before.aliases, "alias", before.name)
        others = [each for each in before.aliases if each not in aliases]
        body = {"aliases": others if remove else [*others, *aliases]}
        deployment = client.change_deployment(before.id, body, revision=before.revision)
    print_answer(deployment, show_deployment, as_json=service.as_json)


def subject(each: DeploymentAnswer) -> str:
    return f"original of {each.artifact}" if each.original else each.artifact


def show_deployments(console: Console, items: Iterable[DeploymentAnswer]) -> None:
    grid = table("!name", "!state", "!artifact", "!servers", "?!engine", "?why")
    for each in items:
        servers = f"{ready_servers(each)} of {each.replicas}"
        grid.add_row(escape(each.name), each.state, subject(each), servers, each.engine, escape(each.reason))
    console.print(grid)


def show_deployment(console: Console, each: DeploymentAnswer) -> None:
    console.print(f"[bold]{escape(each.name)}[/]  {each.state}  {each.id}  {subject(each)}")
    if each.aliases:
        console.print(f"aliases: {escape(', '.join(each.aliases))}")
    if each.reason:
        console.print(escape(each.reason))
    grid = table(">server", "state", "engine", "worker", ">running", ">waiting", ">restarts")
    for server in each.servers:
        grid.add_row(
            str(server.slot), server.state, server.engine, escape(server.worker),
            str(server.running), str(server.waiting), str(server.restarts),
        )  # fmt: skip
    if each.servers:
        console.print(grid)
