"""`nibble compare`: jobs and artifacts beside their originals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from app.commands.gains import is_beyond_noise, percent, smallest
from app.commands.short_ids import artifact_id, job_id
from app.commands.show import model_name
from app.commands.terminal import (
    Service,
    human_bytes,
    print_json,
    stdout,
    table,
)
from app.core.errors import NibbleError, NotFound

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import ArtifactAnswer, NibbleClient

Row = dict[str, Any]
MEASURED = ("bytes", "perplexity", "perplexity_ratio", "kl", "top1_agreement", "tokens_per_s")


def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="JOB|ARTIFACT...",
            help="Ids, the start of them, or `last`, the newest job.",
            show_default=False,
        ),
    ],
    *,
    service: Service,
) -> None:
    """Compare jobs and artifacts with their originals: size, perplexity, KL, top token.

    Each original is the first row of its results. A perplexity that the evaluation text can't tell from the
    original's is marked as noise. The best figure of those that differ is bold.
    """
    with service.connect() as client:
        rows = compared_rows(client, what)
    if service.as_json:
        print_json({"rows": rows})
    else:
        show_comparison(stdout(), rows)


def compared_rows(client: NibbleClient, what: Sequence[str]) -> list[Row]:
    """The originals, each before the results that were made of it."""
    groups: dict[tuple[str, Any], list[Row]] = {}
    for written in what:
        for original, row in results_of(client, written):
            # Texts differ between jobs: an original that was measured on another text is another row.
            key = (row["model"], original.get("perplexity"))
            group = groups.setdefault(key, [original])
            if row not in group:
                group.append(row)
    return [row for group in groups.values() for row in group]


def results_of(client: NibbleClient, written: str) -> list[tuple[Row, Row]]:
    """An original and a result for each artifact of a job, or for the one that is named."""
    if written.startswith("art_"):
        artifacts = [client.artifact(artifact_id(client, written))]
        report = report_of(client, artifacts[0].job)
    else:
        job = client.job(job_id(client, written)).require_success()
        artifacts = [each for each in (artifact_or_none(client, each) for each in job.artifacts) if each]
        if not artifacts:
            raise NotFound(
                f"the artifacts of {job.id} were deleted", code="artifact_not_found",
                remedy=f"`nibble report {job.id}` has its figures",
            )  # fmt: skip
        report = client.report(job.id)
    original = {"label": "original", **(report.get("original") or {})}
    return [(original_row(each, original), result_row(each, report)) for each in artifacts]


def artifact_or_none(client: NibbleClient, whole: str) -> ArtifactAnswer | None:
    try:
        return client.artifact(whole)
    except NotFound:  # it was deleted; its job names it still
        return None


def report_of(client: NibbleClient, job: str) -> Mapping[str, Any]:
    """The report of an artifact's job; nothing if the job was deleted: its summary has the figures."""
    try:
        return client.report(job)
    except NibbleError:
        return {}


def original_row(artifact: ArtifactAnswer, original: Mapping[str, Any]) -> Row:
    figures = {name: original.get(name) for name in MEASURED}
    return {"model": artifact.model, "label": "original", "artifact": None, "job": artifact.job, **figures}


def result_row(artifact: ArtifactAnswer, report: Mapping[str, Any]) -> Row:
    """The figures of the artifact's manifest, which outlives its job; sizes are those of the weights."""
    summary = artifact.summary
    figures = {name: summary.get(name) for name in MEASURED}
    size = smallest(summary.get("bytes")) or artifact.size
    return {
        "model": artifact.model, "label": str(summary.get("label", artifact.format)),
        "format": artifact.format, "artifact": artifact.id, "job": artifact.job, **figures, "bytes": size,
        "perplexity_ratio_interval": summary.get("perplexity_ratio_interval"),
        "beyond_noise": summary.get("beyond_noise"),
        "original_bytes": (report.get("original") or {}).get("bytes"),
    }  # fmt: skip


def show_comparison(console: Console, rows: Sequence[Row]) -> None:
    grid = table(
        "!result",
        ">size",
        ">perplexity",
        ">change ± 95 %",
        ">KL",
        ">top-1",
        "?>tokens/s",
        "?!artifact",
        turns=True,
    )
    best = best_values(rows)
    for row, name in zip(rows, row_names(rows), strict=True):
        grid.add_row(
            escape(name),
            marked(row, "bytes", best, size_text(row)),
            marked(row, "perplexity", best, number(row.get("perplexity"), 2)),
            change_text(row),
            marked(row, "kl", best, number(row.get("kl"), 4)),
            marked(row, "top1_agreement", best, share(row.get("top1_agreement"))),
            number(row.get("tokens_per_s"), 1),
            row.get("artifact") or "",
        )
    console.print(grid)


def row_names(rows: Sequence[Row]) -> list[str]:
    """Labels, with the model where there are several, and the format where one recipe has several."""
    several = len({row["model"] for row in rows}) > 1
    names = [f"{model_name(row['model'])} {row['label']}" if several else row["label"] for row in rows]
    return [
        f"{name} ({row['format']})" if names.count(name) > 1 and row["artifact"] else name
        for row, name in zip(rows, names, strict=True)
    ]


def best_values(rows: Sequence[Row]) -> dict[str, float]:
    """The best value of each figure in which the results differ; of the originals none."""
    results = [row for row in rows if row["artifact"] is not None]
    best = {}
    for name, choose in (("bytes", min), ("perplexity", min), ("kl", min), ("top1_agreement", max)):
        values = {row[name] for row in results if row.get(name) is not None}
        if len(values) > 1:
            best[name] = choose(values)
    return best


def marked(row: Row, name: str, best: Mapping[str, float], text: str) -> str:
    return f"[bold]{text}[/]" if row["artifact"] and name in best and row.get(name) == best[name] else text


def size_text(row: Row) -> str:
    """`4.6 MB (2.5×)`: how much smaller than the original."""
    before, after = row.get("original_bytes"), row.get("bytes")
    if not after:
        return ""
    return human_bytes(after) + (f" ({before / after:.1f}×)" if before else "")


def change_text(row: Row) -> str:
    """`+0.12 ± 0.79 % noise`: half the 95 % interval, and whether the text can tell the two models apart."""
    ratio, interval = row.get("perplexity_ratio"), row.get("perplexity_ratio_interval")
    if ratio is None or row["artifact"] is None:
        return ""
    if interval is None:
        return percent(ratio)
    half = 50 * (interval["high"] - interval["low"])
    noise = "" if is_beyond_noise(row) else " noise"
    return f"{percent(ratio).removesuffix(' %')} ± {half:.2f} %{noise}"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
