"""Commands about texts of one's own: upload, list, show, delete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from app.commands.help_pages import HelpfulCommand, group
from app.commands.short_ids import AS_ID, whole_id
from app.commands.show import print_answer
from app.commands.terminal import (
    ApiKey,
    AsJson,
    Url,
    Yes,
    confirm,
    connect,
    human_bytes,
    print_json,
    stdout,
    table,
)
from app.core.errors import InvalidRequest

if TYPE_CHECKING:
    from app.client import DatasetAnswer, NibbleClient

datasets = group("Upload, list, show and delete texts of your own.", no_args_is_help=True)
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help=f"A dataset: {AS_ID}.")]
SequenceLength = Annotated[int, typer.Option(min=8, help="Tokens of the windows that are counted.")]


def dataset_id(client: NibbleClient, written: str) -> str:
    return whole_id(written, "dataset", lambda: (each.id for each in client.each_dataset()))


@datasets.command(cls=HelpfulCommand)
def upload(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A text file: .jsonl, .json, .csv, .tsv or .txt, also packed as .gz.",
        ),
    ],
    *,
    sequence_length: SequenceLength = 512,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Upload a text for calibration and evaluation, and show what was read of it."""
    if not file.is_file():
        raise InvalidRequest(
            f"there is no file {file}", code="text_source_invalid", remedy="give a text file of this machine"
        )
    with connect(url, api_key) as client:
        dataset = client.upload_dataset(file.name, file, sequence_length=sequence_length)
    if as_json:
        print_json(dataset.model_dump(mode="json"))
        return
    show_dataset(stdout(), dataset)
    stdout().print(f"nibble submit MODEL --dataset {escape(dataset.reference)}")


@datasets.command("list", cls=HelpfulCommand)
def list_datasets(
    *,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most datasets to list.")] = 20,
    sequence_length: SequenceLength = 512,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List datasets, newest first."""
    with connect(url, api_key) as client:
        page = client.datasets(limit=limit, sequence_length=sequence_length)
    if as_json:
        print_json(page.model_dump(mode="json", by_alias=True))
        return
    grid = table("!id", "name", ">size", ">documents", ">windows", "?!created")
    for each in page.items:
        grid.add_row(
            each.id, escape(each.name), human_bytes(each.size), about(each, each.documents),
            about(each, each.windows, estimated=True), f"{each.created_at:%Y-%m-%d %H:%M}",
        )  # fmt: skip
    stdout().print(grid)


@datasets.command(cls=HelpfulCommand)
def show(
    dataset: DatasetId,
    *,
    sequence_length: SequenceLength = 512,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Show what was read of a dataset, and how its first documents begin."""
    with connect(url, api_key) as client:
        answer = client.dataset(dataset_id(client, dataset), sequence_length=sequence_length)
    print_answer(answer, show_dataset, as_json=as_json)


@datasets.command(cls=HelpfulCommand)
def delete(
    dataset: DatasetId, *, yes: Yes = False, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None
) -> None:
    """Delete a dataset, unless a job that has not ended reads it."""
    with connect(url, api_key) as client:
        whole = dataset_id(client, dataset)
        confirm(f"delete {whole}?", yes=yes)
        client.delete_dataset(whole)
    if as_json:
        print_json({"id": whole, "deleted": True})
    else:
        stdout().print(f"{escape(whole)} is gone")


def show_dataset(console: Console, dataset: DatasetAnswer) -> None:
    chats = (
        f", {about(dataset, dataset.conversations)} of them conversations" if dataset.conversations else ""
    )
    console.print(f"{escape(dataset.id)}  {escape(dataset.name)}  {human_bytes(dataset.size)}")
    console.print(
        f"{about(dataset, dataset.documents)} documents{chats}, "
        f"{about(dataset, dataset.windows, estimated=True)} windows of {dataset.sequence_length} tokens"
    )
    for text in dataset.first:
        console.print(f"  {escape(' '.join(text.split())[:200])}")


def about(dataset: DatasetAnswer, count: int | None, *, estimated: bool = False) -> str:
    """A count, `about` it where it is estimated, `?` where the beginning of the file does not tell."""
    if count is None:
        return "?"
    return f"about {count}" if estimated or dataset.is_estimate else str(count)
