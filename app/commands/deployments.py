"""Commands about deployments: deploy, list, show, scale, pause, replace, rename, delete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.markup import escape

from app.commands.help_pages import HelpfulCommand, group
from app.commands.job_options import without_none
from app.commands.short_ids import ArtifactId, artifact_id, deployment_of
from app.commands.show import print_answer, print_page
from app.commands.terminal import (
    After,
    ApiKey,
    AsJson,
    Limit,
    Url,
    Yes,
    among,
    confirm,
    connect,
    print_json,
    stderr,
    stdout,
    table,
)
from app.core.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import DeploymentAnswer, NibbleClient
    from app.core.records.job import Problem

deployments = group("List, show, change and delete deployments.")

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A deployment's name, its id, the start of it, or `last`.")
]

Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is ready.")]
Until = Callable[["DeploymentAnswer"], bool]
UNSERVED = ("paused", "stopped")  # states in which no server is to come


class Service(NamedTuple):
    """The options that each of the commands has."""

    url: str | None
    api_key: str | None
    as_json: bool


def deploy(
    artifact: ArtifactId,
    *,
    name: Annotated[str, typer.Option("--name", "-n", help="The model's name in requests.")],
    engine: Annotated[
        str,
        typer.Option(
            help="auto, transformers or vllm.", autocompletion=among("auto", "transformers", "vllm")
        ),
    ] = "auto",
    replicas: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="Number of servers.")] = 1,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name; may be repeated.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of computing and cache: float16, bfloat16, float32.",
            autocompletion=among("auto", "float16", "bfloat16", "float32"),
            show_default=False,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", min=1, help="Of a prompt and its answer.", show_default=False),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Requests that run at once; more wait.", show_default=False),
    ] = None,
    cache_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="transformers: of the free memory for the cache, as 0.5.",
            show_default=False,
        ),
    ] = None,
    idle_timeout: Annotated[
        int | None,
        typer.Option(metavar="SECONDS", help="Unload after this long without a request.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size",
            metavar="N",
            help="vllm: GPUs per layer.",
            show_default=False,
        ),
    ] = None,
    pipeline_parallel: Annotated[
        int | None,
        typer.Option(
            "--pipeline-parallel-size",
            metavar="N",
            help="vllm: pipeline stages, one per GPU.",
            show_default=False,
        ),
    ] = None,
    wait: Wait = True,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Serve an artifact with OpenAI's API."""
    vllm = without_none(
        {"tensor_parallel_size": tensor_parallel, "pipeline_parallel_size": pipeline_parallel}
    )
    body = {"name": name, "engine": engine, "replicas": replicas}
    body |= without_none({"aliases": alias, "idle_timeout_s": idle_timeout, "dtype": dtype})
    body |= without_none({"max_model_len": max_model_len, "max_num_seqs": max_num_seqs})
    body |= without_none({"cache_share": cache_share, "vllm": vllm or None})
    with connect(url, api_key) as client:
        deployment = client.deploy({"artifact": artifact_id(client, artifact), **body})
        if wait:
            console = stderr() if as_json else stdout()
            deployment = await_change(client, deployment, console, quiet=as_json, until=is_ready)
        print_answer(deployment, show_deployment, as_json=as_json)
        if not as_json:
            stdout().print(f"\ntalk to it: [bold]nibble chat {escape(name)}[/]")


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


@deployments.callback(invoke_without_command=True)
def list_deployments(
    context: typer.Context,
    *,
    limit: Limit = 20,
    after: After = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List deployments, newest first."""
    if context.invoked_subcommand is not None:
        return
    with connect(url, api_key) as client:
        page = client.deployments(limit=limit, after=after)
    print_page(page, show_deployments, as_json=as_json, command="nibble deployments")


@deployments.command(cls=HelpfulCommand)
def show(name: Name, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Show a deployment and its servers."""
    with connect(url, api_key) as client:
        deployment = deployment_of(client, name)
    print_answer(deployment, show_deployment, as_json=as_json)


@deployments.command(cls=HelpfulCommand)
def delete(
    name: Name, *, yes: Yes = False, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None
) -> None:
    """Delete a deployment: it finishes running requests, then stops."""
    with connect(url, api_key) as client:
        deployment = deployment_of(client, name)
        confirm(f"delete the deployment {deployment.name}?", yes=yes)
        with (stderr() if as_json else stdout()).status(f"{escape(deployment.name)} finishes its requests"):
            client.delete_deployment(deployment.id, wait=True)
    if as_json:
        print_json({"id": deployment.id, "name": deployment.name, "deleted": True})
    else:
        stdout().print(f"{escape(deployment.name)} is gone")


def change(name: str, changes: dict[str, Any], service: Service, *, until: Until | None = None) -> None:
    """Change a deployment, wait until it is so, and show it."""
    with connect(service.url, service.api_key) as client:
        deployment = client.change_deployment(deployment_of(client, name).id, changes)
        if until is not None:
            console = stderr() if service.as_json else stdout()
            deployment = await_change(client, deployment, console, quiet=service.as_json, until=until)
    print_answer(deployment, show_deployment, as_json=service.as_json)


@deployments.command(cls=HelpfulCommand)
def scale(
    name: Name,
    replicas: Annotated[int, typer.Argument(metavar="N", min=1, max=16, help="Number of servers.")],
    *,
    wait: Wait = True,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Serve with more or fewer servers; those that go finish their requests."""

    def is_scaled(each: DeploymentAnswer) -> bool:
        return each.state in UNSERVED or ready_servers(each) == len(each.servers) == replicas

    change(name, {"replicas": replicas}, Service(url, api_key, as_json), until=is_scaled if wait else None)


@deployments.command(cls=HelpfulCommand)
def pause(name: Name, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Stop a deployment's servers until you resume it; its name stays."""
    change(name, {"paused": True}, Service(url, api_key, as_json))


@deployments.command(cls=HelpfulCommand)
def resume(
    name: Name, *, wait: Wait = True, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None
) -> None:
    """Start a paused deployment again, or one that failed."""
    change(name, {"paused": False}, Service(url, api_key, as_json), until=is_ready if wait else None)


@deployments.command(cls=HelpfulCommand)
def replace(
    name: Name,
    artifact: ArtifactId,
    *,
    wait: Wait = True,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Serve another artifact under the same name, without a gap.

    New servers start beside the old ones, which end as the new ones are ready.
    """
    service = Service(url, api_key, as_json)
    with connect(url, api_key) as client:
        chosen = artifact_id(client, artifact)
    change(name, {"artifact": chosen}, service, until=is_replaced if wait else None)


@deployments.command(cls=HelpfulCommand)
def alias(
    name: Name,
    aliases: Annotated[list[str], typer.Argument(metavar="ALIAS...", help="Further names.")],
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Take these names away.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Give a deployment further names, which requests may use, or take some away."""
    with connect(url, api_key) as client:
        before = deployment_of(client, name)
        others = [each for each in before.aliases if each not in aliases]
        body = {"aliases": others if remove else [*others, *aliases]}
        deployment = client.change_deployment(before.id, body, revision=before.revision)
    print_answer(deployment, show_deployment, as_json=as_json)


def show_deployments(console: Console, items: Iterable[DeploymentAnswer]) -> None:
    grid = table("!name", "!state", "!artifact", "!servers", "?!engine", "?why")
    for each in items:
        servers = f"{ready_servers(each)} of {each.replicas}"
        grid.add_row(escape(each.name), each.state, each.artifact, servers, each.engine, escape(each.reason))
    console.print(grid)


def show_deployment(console: Console, each: DeploymentAnswer) -> None:
    console.print(f"[bold]{escape(each.name)}[/]  {each.state}  {each.id}  {each.artifact}")
    if each.aliases:
        console.print(f"also called {escape(', '.join(each.aliases))}")
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
