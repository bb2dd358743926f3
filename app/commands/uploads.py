"""Commands about texts of one's own: upload, list, show, delete."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from app.commands.help_pages import CommandGroup
from app.commands.lists import print_page
from app.commands.short_ids import AS_ID, whole_id
from app.commands.show import print_answer
from app.commands.terminal import (
    After,
    Limit,
    Service,
    Yes,
    confirm,
    human_bytes,
    print_json,
    stdout,
    table,
)
from app.core.errors import InvalidRequest
from app.core.records.counted import counted

if TYPE_CHECKING:
    from app.client import DatasetAnswer, NibbleClient

datasets = CommandGroup("Upload, list, show and delete texts of your own.", no_args_is_help=True)
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help=f"A dataset: {AS_ID}.")]
SequenceLength = Annotated[int, typer.Option(min=8, help="Tokens per window, for the count of windows.")]


def dataset_id(client: NibbleClient, written: str) -> str:
    return whole_id(written, "dataset", lambda: (each.id for each in client.each_dataset()))


@datasets.command()
def upload(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A text file: .jsonl, .json, .csv, .tsv or .txt, or any of them as .gz.",
        ),
    ],
    *,
    sequence_length: SequenceLength = 512,
    service: Service,
) -> None:
    """Upload a text for calibration and evaluation, and show what was read of it."""
    if not file.is_file():
        raise InvalidRequest(
            f"there is no file {file}", code="text_source_invalid", remedy="name a text file on this machine"
        )
    with service.connect() as client:
        dataset = client.upload_dataset(file.name, file, sequence_length=sequence_length)
    if service.as_json:
        print_json(dataset.model_dump(mode="json"))
        return
    show_dataset(stdout(), dataset)
    stdout().print(f"nibble submit MODEL --dataset {escape(dataset.reference)}")


@datasets.command("list")
def list_datasets(
    context: typer.Context,
    *,
    limit: Limit = 20,
    after: After = None,
    sequence_length: SequenceLength = 512,
    service: Service,
) -> None:
    """List datasets, newest first."""
    with service.connect() as client:
        page = client.datasets(limit=limit, after=after, sequence_length=sequence_length)
    print_page(page, show_datasets, context, as_json=service.as_json)


@datasets.command()
def show(
    dataset: DatasetId,
    *,
    sequence_length: SequenceLength = 512,
    service: Service,
) -> None:
    """Show what was read of a dataset, and how its first documents begin."""
    with service.connect() as client:
        answer = client.dataset(dataset_id(client, dataset), sequence_length=sequence_length)
    print_answer(answer, show_dataset, as_json=service.as_json)


@datasets.command()
def delete(dataset: DatasetId, *, yes: Yes = False, service: Service) -> None:
    """Delete a dataset, unless a job that has not ended reads it."""
    with service.connect() as client:
        whole = dataset_id(client, dataset)
        confirm(f"delete {whole}?", yes=yes)
        client.delete_dataset(whole)
    if service.as_json:
        print_json({"id": whole, "deleted": True})
    else:
        stdout().print(f"{escape(whole)} is deleted")


def show_datasets(console: Console, datasets: Iterable[DatasetAnswer]) -> None:
    grid = table("!id", "name", ">size", ">documents", ">windows", "?!created")
    for each in datasets:
        grid.add_row(
            each.id, escape(each.name), human_bytes(each.size), about(each, each.documents),
            about(each, each.windows, estimated=True), f"{each.created_at:%Y-%m-%d %H:%M}",
        )  # fmt: skip
    console.print(grid)


def show_dataset(console: Console, dataset: DatasetAnswer) -> None:
    chats = dataset.conversations
    of_them = f", {about(dataset, chats)} of them conversations" if chats else ""
    documents = about(dataset, dataset.documents, "document")
    windows = about(dataset, dataset.windows, "window", estimated=True)
    console.print(f"{escape(dataset.id)}  {escape(dataset.name)}  {human_bytes(dataset.size)}")
    console.print(f"{documents}{of_them}, {windows} of {dataset.sequence_length} tokens")
    for text in dataset.first:
        console.print(f"  {escape(' '.join(text.split())[:200])}")


def about(dataset: DatasetAnswer, count: int | None, noun: str = "", *, estimated: bool = False) -> str:
    """A count, `about` it where it is estimated, `?` where the beginning of the file does not tell."""
    if count is None:
        return f"? {noun}s" if noun else "?"
    shown = counted(count, noun) if noun else str(count)
    return f"about {shown}" if count and (estimated or dataset.is_estimate) else shown
