"""nibble recommend: which recipe suits a model on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from app.commands.job_options import model_reference
from app.commands.option_groups import among, without_none
from app.commands.show import figure, show_notes, size_text
from app.commands.terminal import Service, print_json, stdout, table
from app.core.records.device_names import DeviceName

if TYPE_CHECKING:
    from rich.console import Console

Gpu = Annotated[
    str,
    typer.Option(
        help=f"What the model is served on: {', '.join(get_args(DeviceName))}.",
        autocompletion=among(*get_args(DeviceName)),
        show_default=False,
    ),
]
Memory = Annotated[
    str | None, typer.Option(help="Its memory, such as 24GB; default the device's.", show_default=False)
]
Sequences = Annotated[int | None, typer.Option(help="Sequences at a time; default 16.", show_default=False)]
Context = Annotated[
    int | None, typer.Option(help="Tokens of each; default at most 8192.", show_default=False)
]


def recommend(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `nibble submit`.")],
    *,
    gpu: Gpu,
    memory: Memory = None,
    sequences: Sequences = None,
    context: Context = None,
    service: Service,
) -> None:
    """Name a recipe for a model and the device that serves it, with what else would do and what would not."""
    body = without_none({"memory": memory, "sequences": sequences, "context": context})
    with service.connect() as client:
        document = client.recommend({"model": model_reference(model), "gpu": gpu, **body})
    if service.as_json:
        print_json(document)
    else:
        show_recommendation(stdout(), document)


def show_recommendation(console: Console, document: Mapping[str, Any]) -> None:
    """The recipe and why, the others in order, and what was ruled out."""
    from rich.markup import escape

    chosen = document.get("recommended")
    memory = size_text(document.get("usable_bytes"))
    console.print(f"{escape(str(document.get('device_title')))}, {memory} of memory to use")
    choices = [one for one in (chosen, *document.get("alternatives", [])) if one]
    grid = table("!scheme", "!method", ">size", ">bits/weight", "?>sequences", "?>room", "?>tokens of cache")
    for choice in choices:
        recipe = choice.get("recipe", {})
        cache = " + FP8 cache" if recipe.get("kv_cache") else ""
        grid.add_row(
            escape(str(choice.get("scheme")) + cache),
            method_text(recipe),
            size_text(choice.get("output_bytes")),
            figure(choice.get("bits_per_weight"), 2),
            count_text(choice.get("cache_sequences")),
            size_text(choice.get("room_bytes")),
            count_text(choice.get("cache_tokens")),
        )
    if choices:
        console.print(grid)
    for number, choice in enumerate(choices, 1):
        console.print(f"{number}. {escape(choice['scheme'])}: {escape(choice['why'])}")
    for one in document.get("ruled_out", []):
        console.print(f"[dim]not {escape(one['scheme'])}: {escape(one['why'])}[/]")
    show_notes(console, document)


def method_text(recipe: Mapping[str, Any]) -> str:
    """`awq+gptq g128`."""
    method = str(recipe.get("method"))
    rounding = "+gptq" if recipe.get("rounding") == "gptq" and method == "awq" else ""
    group = {-1: "rows"}.get(recipe.get("group_size", -1), f"g{recipe.get('group_size')}")
    return f"{method}{rounding} {group}"


def count_text(count: int | None) -> str:
    return "unknown" if count is None else str(count)
