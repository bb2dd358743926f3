"""Tables: jobs, artifacts, reports, estimates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape

from app.commands.terminal import human_bytes, human_seconds, print_json, stdout, table

if TYPE_CHECKING:
    from app.client.views import ArtifactAnswer, EventAnswer, JobAnswer, Page, WorkerAnswer

# Hints for new users, shown for an empty list.
EMPTY = {
    "nibble jobs": "`nibble submit MODEL` creates a job",
    "nibble artifacts": "a successful job publishes them",
    "nibble deployments": "`nibble deploy ARTIFACT --name NAME` creates one",
    "nibble workers": "`nibble worker` starts one, `nibble up` all that this machine needs",
}
ItemT = TypeVar("ItemT")

# Names of an estimate's figures, shown with their units.
FIGURES = {
    "time_s": "time",
    "ram_bytes": "memory",
    "vram_bytes": "GPU memory",
    "disk_bytes": "disk",
    "download_bytes": "download",
    "output_bytes": "output",
}
STATE_COLOURS = {
    "queued": "cyan",
    "running": "blue",
    "cancelling": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}


def coloured_state(state: str) -> str:
    return f"[{STATE_COLOURS.get(state, 'default')}]{escape(state)}[/]"


def print_page(
    page: Page[ItemT], show: Callable[[Console, Iterable[ItemT]], None], *, as_json: bool, command: str
) -> None:
    """Print a page of a list, and the command for the next page."""
    if as_json:
        print_json(page.model_dump(mode="json", by_alias=True))
        return
    console = stdout()
    if not page.items:
        console.print(f"none: {EMPTY.get(command, 'nothing is there')}")
        return
    show(console, page.items)
    if page.has_more:
        console.print(f"more: {command} --after {page.next}")


def show_jobs(console: Console, jobs: Iterable[JobAnswer]) -> None:
    grid = table("job", "state", "stage", ">done", "created", "recipe", "model")
    for job in jobs:
        grid.add_row(
            job.id,
            coloured_state(job.state),
            "" if job.is_terminal else job.stage or "",
            f"{job.progress.fraction:.0%}",
            job.created_at.strftime("%Y-%m-%d %H:%M:%SZ"),
            recipes_text(job.spec.get("recipe")),
            escape(str(job.spec.get("model", ""))),
        )
    console.print(grid)


def show_job(console: Console, job: JobAnswer) -> None:
    """Print a job's state, error and artifacts."""
    console.print(f"{job.id} {coloured_state(job.state)}")
    if job.error is not None:
        console.print(f"[bold red]error[/] {escape(job.error.message)} [dim]\\[{escape(job.error.code)}][/]")
        if job.error.remedy:
            console.print(f"[bold]remedy[/] {escape(job.error.remedy)}")
    for artifact in job.artifacts:
        console.print(f"artifact {artifact}")


def show_event(console: Console, event: EventAnswer) -> None:
    facts = ", ".join(
        f"{name} {text_of(value)}" for name, value in event.payload.items() if value is not None
    )
    moment = event.at.strftime("%Y-%m-%d %H:%M:%SZ") if event.at is not None else ""
    console.print(f"{moment} [bold]{escape(event.kind):<12}[/] {escape(facts)}")


def text_of(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def show_workers(console: Console, workers: Iterable[WorkerAnswer]) -> None:
    grid = table("worker", "queue", "state", "device", "rates", "runs", "heartbeat")
    for worker in workers:
        runs = worker.job or (f"{worker.servers} servers" if worker.servers else "")
        device = f"{worker.device} {worker.device_name}".strip()
        beat = worker.heartbeat_at.strftime("%H:%M:%SZ")
        rates = worker.rates or ""
        grid.add_row(escape(worker.name), worker.queue, worker.state, escape(device), rates, runs, beat)
    console.print(grid)


def show_artifacts(console: Console, artifacts: Iterable[ArtifactAnswer]) -> None:
    grid = table("artifact", "format", "recipe", ">size", "created", "model")
    for artifact in artifacts:
        grid.add_row(
            artifact.id,
            artifact.format,
            recipe_text(artifact.recipe),
            human_bytes(artifact.size),
            artifact.created_at.strftime("%Y-%m-%d %H:%M:%SZ"),
            escape(artifact.model),
        )
    console.print(grid)


def show_artifact(console: Console, artifact: ArtifactAnswer) -> None:
    console.print(
        f"{artifact.id}  {artifact.format}  {recipe_text(artifact.recipe)}  {escape(artifact.model)}"
    )
    grid = table("file", ">size", "sha256")
    for file in artifact.files:
        grid.add_row(escape(file.path), human_bytes(file.size), file.sha256)
    console.print(grid)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    from app.core.records.specs import Recipe

    return Recipe.model_validate(recipe).label if recipe else ""


def recipes_text(recipes: Any) -> str:
    """A job's recipe, or the first of several and the number of others."""
    listed = recipes if isinstance(recipes, list) else [recipes]
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return recipe_text(listed[0]) + more if listed else ""


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report: one row per candidate, the tries for the target, the seconds of each stage."""
    if report.get("complete") is False:
        show_unfinished(console, report)
        return
    candidates = report.get("candidates", [])
    formats = list(dict.fromkeys(name for candidate in candidates for name in candidate.get("bytes", {})))
    grid = table(
        "candidate", ">perplexity", ">ratio", ">95 % interval", ">KL", ">KL of 99 %", ">same top token",
        *[f">{name}" for name in formats], ">bits/weight", ">error vs RTN",
        title=escape(str(report.get("model", ""))),
    )  # fmt: skip
    original = report.get("original", {})
    grid.add_row(
        "original",
        figure(original.get("perplexity"), 3),
        *[""] * 5,
        *[size_text(original.get("bytes"))] * len(formats),
        figure(original.get("bits_per_weight"), 2),
        "",
    )
    for candidate in candidates:
        sizes = candidate.get("bytes", {})
        grid.add_row(
            escape(str(candidate.get("label", ""))),
            figure(candidate.get("perplexity"), 3),
            figure(candidate.get("perplexity_ratio"), 5),
            interval_text(candidate.get("perplexity_ratio_interval"), candidate.get("beyond_noise")),
            figure(candidate.get("kl"), 5),
            figure(candidate.get("kl_p99"), 4),
            share_text(candidate.get("top1_agreement")),
            *[size_text(sizes.get(name)) for name in formats],
            figure(candidate.get("bits_per_weight"), 2),
            less_text(candidate.get("gain_over_rounding")),
        )
    console.print(grid)
    if "evaluation" in report and report["evaluation"] is None:
        console.print("not evaluated: nothing is known of the quality")
    show_tasks(console, candidates)
    show_tries(console, report.get("tries", []))
    show_stages(console, report.get("stages", {}), report.get("prediction") or {})
    show_notes(console, report)


def show_unfinished(console: Console, report: Mapping[str, Any]) -> None:
    """Print what a job without a result did until its end."""
    finished, layers, stage = report.get("finished_layers"), report.get("layers"), report.get("stage")
    recipes = ", ".join(report.get("recipes", []))
    console.print(f"{escape(str(report.get('model', '')))}, {escape(recipes)}: {report.get('state')}")
    error = report.get("error")
    if error is not None:
        console.print(f"[bold red]error[/] {escape(str(error.get('message')))}")
    if not report.get("attempts"):
        console.print(f"no worker had begun with it in {human_seconds(report.get('waited_s'))}")
    elif stage is None:
        console.print(f"it ended in attempt {report['attempts']}, before any stage")
    else:
        done = f", {finished} of {layers} layers finished" if finished is not None else ""
        console.print(f"it ended in the stage {escape(stage)}{done}, attempt {report.get('attempts')}")
        show_stages(console, report.get("stages", {}), report.get("prediction") or {})
    show_notes(console, report)
    if report.get("output"):
        console.print(escape(str(report["output"])))


def show_tasks(console: Console, candidates: Iterable[Mapping[str, Any]]) -> None:
    """The task scores of each candidate beside the original's, with standard errors."""
    scored = [(each.get("label", ""), each["tasks"]) for each in candidates if each.get("tasks")]
    if not scored:
        return
    grid = table(
        "candidate", "task", "metric", ">documents", ">original", ">quantized", ">recovery", ">95 % interval",
        title="task scores ± standard error",
    )  # fmt: skip
    for label, tasks in scored:
        for score in tasks["scores"]:
            grid.add_row(
                escape(str(label)), escape(score["task"]), escape(score["metric"]), str(score["documents"]),
                score_text(score, "original"), score_text(score, "quantized"),
                share_text(score.get("recovery")), shares_text(score.get("recovery_interval")),
            )  # fmt: skip
        mean = share_text(tasks.get("recovery")), shares_text(tasks.get("recovery_interval"))
        grid.add_row(escape(str(label)), "mean of each task's first metric", "", "", "", "", *mean)
    console.print(grid)


def score_text(score: Mapping[str, Any], model: str) -> str:
    error = score.get(f"{model}_standard_error")
    return figure(score.get(model), 4) + ("" if error is None else f" ± {error:.4f}")


def shares_text(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f"{100 * interval['low']:.1f} to {share_text(interval['high'])}"


def show_tries(console: Console, tries: Iterable[Mapping[str, Any]]) -> None:
    """The recipes tried for the target, in order."""
    grid = table("try", "rung", ">ratio", ">KL", ">bits/weight", ">seconds", "target")
    for one in tries:
        grid.add_row(
            escape(str(one.get("label", ""))),
            escape(str(one.get("rung", ""))),
            figure(one.get("perplexity_ratio"), 5),
            figure(one.get("kl"), 5),
            figure(one.get("bits_per_weight"), 2),
            figure(one.get("seconds"), 2),
            escape(str(one.get("verdict") or ("met" if one.get("meets_target") else "missed"))),
        )
    if grid.row_count:
        console.print(grid)


def show_stages(console: Console, stages: Mapping[str, float], prediction: Mapping[str, Any]) -> None:
    """The seconds of each stage, beside the prediction."""
    predicted = prediction.get("seconds", {})
    grid = table("stage", ">seconds", *([">predicted"] if predicted else []))
    for stage in dict.fromkeys((*predicted, *stages)):
        expected = [figure(predicted.get(stage), 2)] if predicted else []
        grid.add_row(escape(stage), figure(stages.get(stage), 2), *expected)
    total = [f"{sum(predicted.values()):.2f}"] if predicted else []
    grid.add_row("total", f"{sum(stages.values()):.2f}", *total)
    console.print(grid)


def figure(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def interval_text(interval: Mapping[str, float] | None, beyond_noise: bool | None) -> str:
    """`0.99950 to 1.00120, noise` where the evaluation text can't tell the model from the original."""
    if interval is None:
        return ""
    return f"{interval['low']:.5f} to {interval['high']:.5f}{'' if beyond_noise else ', noise'}"


def share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def less_text(share: float | None) -> str:
    """A reduction as a signed percentage: `-48 %` for 0.48."""
    return "" if share is None else f"{0.0 - 100 * share:+.0f} %"


def size_text(size: float | None) -> str:
    return "" if size is None else human_bytes(size)


def show_estimate(console: Console, estimate: Mapping[str, Any]) -> None:
    """Print an estimate's figures and recipes; `--json` lists every linear."""
    grid = table("figure", ">estimate")
    for name, value in estimate.items():
        if name in ("object", "shared_s") or isinstance(value, bool | list | dict) or value is None:
            continue
        grid.add_row(escape(FIGURES.get(name, name.replace("_", " "))), estimate_text(name, value))
    console.print(grid)
    show_stage_estimates(console, estimate)
    show_candidate_estimates(console, estimate)
    for candidate in estimate.get("candidates", []):
        show_decisions(console, candidate)
    show_notes(console, estimate)


def show_notes(console: Console, document: Mapping[str, Any]) -> None:
    for note in document.get("notes", []):
        console.print(f"[yellow]note[/] {escape(str(note))}")


def show_stage_estimates(console: Console, estimate: Mapping[str, Any]) -> None:
    """The seconds of each stage, and their sum."""
    stages = estimate.get("stages", {})
    grid = table("stage", ">seconds")
    for stage, seconds in stages.items():
        grid.add_row(escape(stage), figure(seconds, 1))
    grid.add_row("total", figure(estimate.get("time_s"), 1))
    if stages:
        console.print(grid)


def show_candidate_estimates(console: Console, estimate: Mapping[str, Any]) -> None:
    """One row per recipe: its own time, with what all share the total, and its size in each format."""
    rows = list(estimate.get("candidates", []))
    formats = list(dict.fromkeys(name for row in rows for name in row.get("output_bytes", {})))
    grid = table("candidate", ">seconds", ">bits/weight", *[f">{name}" for name in formats])
    grid.add_row("shared by all", figure(estimate.get("shared_s"), 1))
    for row in rows:
        sizes = row.get("output_bytes", {})
        grid.add_row(
            escape(str(row.get("label", ""))),
            figure(row.get("time_s"), 1),
            figure(row.get("bits_per_weight"), 2),
            *[size_text(sizes.get(name)) for name in formats],
        )
    grid.add_row("total", figure(estimate.get("time_s"), 1))
    if rows:
        console.print(grid)


def show_decisions(console: Console, candidate: Mapping[str, Any]) -> None:
    """Print a recipe's linears, counted by treatment."""
    counts = Counter(decision_text(linear) for linear in candidate.get("linears", []))
    console.print(f"[bold]{escape(str(candidate.get('label', '')))}[/]")
    for text, count in counts.items():
        console.print(f"  {count} linears: {escape(text)}")


def decision_text(linear: Mapping[str, Any]) -> str:
    if linear.get("bits") is None:
        return f"keep their precision, {linear.get('reason')}"
    if linear.get("scheme"):
        return str(linear["scheme"])
    return f"{linear['bits']} bits, group size {linear.get('group_size')}"


def estimate_text(name: str, value: object) -> str:
    if isinstance(value, int | float) and name.endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, int | float) and name.endswith("_s"):
        return human_seconds(value)
    return escape(str(value))
