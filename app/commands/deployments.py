"""Commands about deployments: deploy, list, show, delete."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.commands.job_options import without_none
from app.commands.show import print_page
from app.commands.terminal import (
    After,
    ApiKey,
    AsJson,
    Limit,
    Url,
    among,
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

deployments = typer.Typer(help="List, show and delete deployments.", no_args_is_help=False)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A deployment's name, or its id.")]


def deploy(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="An artifact's id.")],
    *,
    name: Annotated[str, typer.Option("--name", "-n", help="The model's name in requests.")],
    engine: Annotated[
        str,
        typer.Option(
            help="auto, transformers or vllm.", autocompletion=among("auto", "transformers", "vllm")
        ),
    ] = "auto",
    replicas: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="Number of servers.")] = 1,
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
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is ready.")] = True,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Serve an artifact with OpenAI's API."""
    vllm = without_none(
        {"tensor_parallel_size": tensor_parallel, "pipeline_parallel_size": pipeline_parallel}
    )
    body = {"artifact": artifact, "name": name, "engine": engine, "replicas": replicas}
    body |= without_none({"idle_timeout_s": idle_timeout, "vllm": vllm or None})
    with connect(url, api_key) as client:
        deployment = client.deploy(body)
        if wait:
            deployment = await_ready(client, deployment, stderr() if as_json else stdout(), quiet=as_json)
        if as_json:
            print_json(deployment.model_dump(mode="json"))
        else:
            show_deployment(stdout(), deployment)
            stdout().print(f"\ntalk to it: [bold]nibble chat {escape(name)}[/]")


def await_ready(
    client: NibbleClient, deployment: DeploymentAnswer, console: Console, *, quiet: bool
) -> DeploymentAnswer:
    """Wait until the deployment is ready, and show its status. Raises Unavailable if it fails."""
    shown = ""
    with (
        console.status(f"starting {escape(deployment.name)}") as status,
        closing(client.follow_deployment(deployment.id)) as changes,
    ):
        for deployment in changes:
            if deployment.state != "starting":
                break
            if deployment.reason != shown and not quiet:
                shown = deployment.reason
                status.update(escape(shown))
                if not console.is_terminal:
                    console.print(escape(shown))
    if deployment.state != "ready":
        error = deployment.error
        raise Unavailable(
            error.message
            if error is not None
            else f"{deployment.name} is {deployment.state}: {deployment.reason}",
            code=error.code if error is not None else "deployment_not_ready",
            remedy=error.remedy if error is not None else "",
        )
    return deployment


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


@deployments.command()
def show(name: Name, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Show a deployment and its servers."""
    with connect(url, api_key) as client:
        deployment = client.deployment_named(name)
    if as_json:
        print_json(deployment.model_dump(mode="json"))
    else:
        show_deployment(stdout(), deployment)


@deployments.command()
def delete(name: Name, *, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Delete a deployment: it finishes running requests, then stops."""
    with connect(url, api_key) as client:
        deployment = client.deployment_named(name)
        with (stderr() if as_json else stdout()).status(f"{escape(deployment.name)} finishes its requests"):
            client.delete_deployment(deployment.id, wait=True)
    if as_json:
        print_json({"id": deployment.id, "name": deployment.name, "deleted": True})
    else:
        stdout().print(f"{escape(deployment.name)} is gone")


def show_deployments(console: Console, items: Iterable[DeploymentAnswer]) -> None:
    grid = table("name", "state", "engine", "servers", "artifact", "why")
    for each in items:
        ready = sum(server.state == "ready" for server in each.servers)
        servers = f"{ready} of {each.replicas}"
        grid.add_row(escape(each.name), each.state, each.engine, servers, each.artifact, escape(each.reason))
    console.print(grid)


def show_deployment(console: Console, each: DeploymentAnswer) -> None:
    console.print(f"[bold]{escape(each.name)}[/]  {each.state}  {each.id}  {each.artifact}")
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
