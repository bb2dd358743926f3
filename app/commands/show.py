"""Tables: jobs, artifacts, reports, estimates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape

from app.commands.remedies import with_options
from app.commands.terminal import human_bytes, human_seconds, print_json, show_fault, stdout, table
from app.core.records.counted import counted
from app.core.records.job import Problem

if TYPE_CHECKING:
    from app.client.views import ArtifactAnswer, EventAnswer, JobAnswer, ServiceAnswer, WorkerAnswer

AnswerT = TypeVar("AnswerT", bound="ServiceAnswer")

# An estimate's figures in the order of the table, and what they are called.
FIGURES = {
    "time_s": "time",
    "ram_bytes": "memory",
    "vram_bytes": "GPU memory",
    "disk_bytes": "disk",
    "download_bytes": "download",
    "output_bytes": "output",
    "model": "model",
    "architecture": "architecture",
    "parameters": "parameters",
    "layers": "layers",
    "device": "device",
    "basis": "speed of the device",
}
BASES = {"nominal": "assumed: not measured yet"}  # what an estimate's rates are, in words
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


def print_answer(answer: AnswerT, show: Callable[[Console, AnswerT], None], *, as_json: bool) -> None:
    """Print what the service answered, for people or for programs."""
    if as_json:
        print_json(answer.model_dump(mode="json"))
    else:
        show(stdout(), answer)


def show_jobs(console: Console, jobs: Iterable[JobAnswer]) -> None:
    grid = table("!job", "!state", "recipe", "model", "?!age", "?!stage")
    for job in jobs:
        done = "" if job.is_terminal else f" {job.progress.fraction:.0%}"
        grid.add_row(
            job.id,
            coloured_state(job.state) + done,
            recipes_text(job.spec.get("recipe")),
            escape(model_name(str(job.spec.get("model", "")))),
            age_text(job.created_at),
            "" if job.is_terminal else job.stage or "",
        )
    console.print(grid)


def model_name(reference: str) -> str:
    """A reference without what all have in common: the last folder of a path, the repository of a hub's."""
    if reference.startswith(("file://", "s3://", "/")):
        return reference.rstrip("/").rpartition("/")[2]
    return reference.removeprefix("hf:")


def age_text(moment: datetime, now: datetime | None = None) -> str:
    """`3 min`, `2 h`, `5 d`: how long ago that was."""
    seconds = max(0.0, ((now or datetime.now(UTC)) - moment).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def show_job(console: Console, job: JobAnswer) -> None:
    """Print a job's state, how long it took, its error and artifacts."""
    took = ""
    if job.is_terminal and job.started_at is not None and job.finished_at is not None:
        took = f" in {human_seconds((job.finished_at - job.started_at).total_seconds())}"
    console.print(f"{job.id} {coloured_state(job.state)}{took}")
    if job.error is not None:
        show_fault(console, job.error)
    for artifact in job.artifacts:
        console.print(f"artifact {artifact}")


def show_event(console: Console, event: EventAnswer) -> None:
    moment = event.at.strftime("%Y-%m-%d %H:%M:%SZ") if event.at is not None else ""
    console.print(f"{moment} [bold]{escape(event.kind):<12}[/] {escape(event_text(event))}")


def show_log_line(console: Console, event: EventAnswer) -> None:
    """An event as a line of a log; of a crash also what the process wrote."""
    moment = event.at.strftime("%H:%M:%S") if event.at is not None else ""
    console.print(f"[dim]{moment}[/] {escape(event_text(event))}")
    output = event.payload.get("output")
    if output:
        console.print(escape(str(output).rstrip()))


def event_text(event: EventAnswer) -> str:
    """An event in words, with options in place of fields; of an unknown kind its fields."""
    return with_options(worded(event))


def worded(event: EventAnswer) -> str:
    payload = event.payload
    attempt = payload.get("attempt")
    of_attempt = f", attempt {attempt}" if isinstance(attempt, int) and attempt > 1 else ""
    match event.kind:
        case "state":
            worker = f" on {payload['worker']}" if payload.get("worker") else ""
            error = payload.get("error") or {}
            why = f": {error.get('message')} [{error.get('code')}]" if error else ""
            return f"{payload.get('state')}{worker}{of_attempt}{why}"
        case "stage":
            return f"{payload.get('stage')}{of_attempt}"
        case "note":
            return str(payload.get("message"))
        case "retry":
            pause = f" in {payload['pause_s']:g} s" if "pause_s" in payload else ""
            return f"attempt {attempt} failed, the next begins{pause}: {payload.get('message')}"
        case "failure":
            return f"its process failed [{payload.get('code')}]"
        case "checkpoint":
            return f"saved {str(payload.get('key', '')).rpartition('/')[2]}"
        case "resumed":
            return f"resumed after {counted(payload.get('checkpoints') or 0, 'checkpoint')}{of_attempt}"
    return ", ".join(
        f"{name} {text_of(value)}" for name, value in payload.items() if value not in (None, "", [], {})
    )


def text_of(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def show_workers(console: Console, workers: Iterable[WorkerAnswer]) -> None:
    grid = table("worker", "!queue", "!state", "device", "runs", "?rates", "?!heartbeat")
    for worker in workers:
        runs = worker.job or (counted(worker.servers, "server") if worker.servers else "")
        device = worker.device_name if worker.device == "cpu" else f"{worker.device} {worker.device_name}"
        beat = worker.heartbeat_at.strftime("%H:%M:%SZ")
        rates = worker.rates or ""
        grid.add_row(
            escape(worker.name), worker.queue, worker.state, escape(device or "cpu"), runs, rates, beat
        )
    console.print(grid)


def show_artifacts(console: Console, artifacts: Iterable[ArtifactAnswer]) -> None:
    grid = table("!artifact", "recipe", ">size", "model", "?tags", "?!age", "?format")
    for artifact in artifacts:
        grid.add_row(
            artifact.id,
            recipe_text(artifact.recipe),
            human_bytes(artifact.size),
            escape(model_name(artifact.model)),
            escape(", ".join(artifact.tags)),
            age_text(artifact.created_at),
            artifact.format,
        )
    console.print(grid)


def show_artifact(console: Console, artifact: ArtifactAnswer) -> None:
    console.print(
        f"{artifact.id}  {artifact.format}  {recipe_text(artifact.recipe)}  {escape(artifact.model)}"
    )
    if artifact.tags:
        console.print(f"tags: {escape(', '.join(artifact.tags))}")
    for push in artifact.pushes:
        said = push.commit_url or (push.error.message if push.error is not None else "")
        console.print(f"push to {escape(push.repo_id)}: {push.state} {escape(said)}".rstrip())
    grid = table("!file", ">size", "sha256")
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


def model_text(report: Mapping[str, Any]) -> str:
    """The model of a report, with the adapter that was merged into it."""
    adapter = report.get("adapter")
    return f"{report.get('model', '')}{f' with {adapter}' if adapter else ''}"


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report: one row per candidate, the tries for the target, the seconds of each stage."""
    if report.get("complete") is False:
        show_unfinished(console, report)
        return
    if "evaluation" in report and report["evaluation"] is None:
        show_unjudged(console, report)
        return
    candidates = report.get("candidates", [])
    formats = list(dict.fromkeys(name for candidate in candidates for name in candidate.get("bytes", {})))
    grid = table(
        "!candidate", ">perplexity", ">ratio", ">95 % interval", ">KL", ">KL of 99 %", ">same top token",
        *[f">{name}" for name in formats], ">bits/weight", ">error vs RTN",
        title=escape(model_text(report)),
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
    show_caches(console, candidates)
    show_tasks(console, candidates)
    show_tries(console, report.get("tries", []))
    show_stages(console, report.get("stages", {}), report.get("prediction") or {})
    show_use(console, report)
    show_notes(console, report)


def show_unjudged(console: Console, report: Mapping[str, Any]) -> None:
    """Print the report of a job without an evaluation: sizes, and how far rounding moved the weights."""
    candidates = report.get("candidates", [])
    formats = list(dict.fromkeys(name for candidate in candidates for name in candidate.get("bytes", {})))
    grid = table(
        "candidate", *[f">{name}" for name in formats], ">bits/weight", ">weight error by linear",
        title=escape(model_text(report)),
    )  # fmt: skip
    original = report.get("original", {})
    grid.add_row("original", *[size_text(original.get("bytes"))] * len(formats), "", "")
    for candidate in candidates:
        errors = [each.get("weight_error") for each in candidate.get("linears", [])]
        errors = sorted(error for error in errors if error is not None)
        grid.add_row(
            escape(str(candidate.get("label", ""))),
            *[size_text(candidate.get("bytes", {}).get(name)) for name in formats],
            figure(candidate.get("bits_per_weight"), 2),
            f"{share_text(errors[0])} to {share_text(errors[-1])}" if errors else "",
        )
    console.print(grid)
    console.print("not evaluated: its quality is unknown")
    show_stages(console, report.get("stages", {}), report.get("prediction") or {})
    show_use(console, report)
    show_notes(console, report)


def show_unfinished(console: Console, report: Mapping[str, Any]) -> None:
    """Print what a job without a result did until its end."""
    finished, layers, stage = report.get("finished_layers"), report.get("layers"), report.get("stage")
    recipes = ", ".join(report.get("recipes", []))
    console.print(f"{escape(str(report.get('model', '')))}, {escape(recipes)}: {report.get('state')}")
    if report.get("error") is not None:
        show_fault(console, Problem.model_validate(report["error"]))
    if not report.get("attempts"):
        console.print(f"no worker started it within {human_seconds(report.get('waited_s'))}")
    elif stage is None:
        console.print(f"it ended in attempt {report['attempts']}, before the first stage")
    else:
        done = f", {finished} of {counted(layers or 0, 'layer')} finished" if finished is not None else ""
        console.print(f"it ended in the stage {escape(stage)}{done}, attempt {report.get('attempts')}")
        show_stages(console, report.get("stages", {}), report.get("prediction") or {})
    show_use(console, report)
    show_notes(console, report)
    if report.get("output"):
        console.print(escape(str(report["output"])))


def show_caches(console: Console, candidates: Iterable[Mapping[str, Any]]) -> None:
    """The scales of each candidate's cache, where it is rounded."""
    for candidate in candidates:
        cache = candidate.get("cache")
        if cache is not None:
            keys, values = ("{:.3g} to {:.3g}".format(*cache[f"{name}_scales"]) for name in ("key", "value"))
            layers = counted(cache["layers"], "layer")
            console.print(
                f"{escape(str(candidate.get('label', '')))}: keys and values of {layers} are "
                f"{cache['numbers']}, with scales of {keys} and {values}"
            )


def show_tasks(console: Console, candidates: Iterable[Mapping[str, Any]]) -> None:
    """The task scores of each candidate beside the original's, with standard errors."""
    scored = [(each.get("label", ""), each["tasks"]) for each in candidates if each.get("tasks")]
    if not scored:
        return
    grid = table(
        "candidate", "task", "metric", ">documents", ">original", ">quantized", ">recovery", ">95 % interval",
        title="task scores ± standard error", turns=True,
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
    grid = table("!try", "rung", ">ratio", ">KL", ">bits/weight", ">seconds", "target")
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
    console.print()
    grid = table("stage", ">seconds", *([">predicted"] if predicted else []))
    for stage in dict.fromkeys((*predicted, *stages)):
        expected = [figure(predicted.get(stage), 2)] if predicted else []
        grid.add_row(escape(stage), figure(stages.get(stage), 2), *expected)
    total = [f"{sum(predicted.values()):.2f}"] if predicted else []
    grid.add_row("total", f"{sum(stages.values()):.2f}", *total)
    console.print(grid)


def show_use(console: Console, report: Mapping[str, Any]) -> None:
    """Peaks of memory beside the estimate, and how many cores worked on average."""
    prediction, cpu_seconds = report.get("prediction") or {}, report.get("cpu_seconds") or {}
    for name, measured, estimated in (
        ("peak memory", "peak_rss_bytes", "ram_bytes"),
        ("peak GPU memory", "peak_vram_bytes", "vram_bytes"),
    ):
        if report.get(measured):
            expected = prediction.get(estimated)
            beside = f", estimated {human_bytes(expected)}" if expected else ""
            console.print(f"{name} {human_bytes(report[measured])}{beside}")
    spent = sum(report["stages"].get(stage, 0.0) for stage in cpu_seconds)
    if spent > 0:
        console.print(f"processor {sum(cpu_seconds.values()) / spent:.1f} cores on average")


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
    for name, called in FIGURES.items():
        value = estimate.get(name)
        if isinstance(value, str | int | float) and value != 0:
            console.print(f"{called:<20} {estimate_text(name, value)}")
    show_stage_estimates(console, estimate)
    show_candidate_estimates(console, estimate)
    for candidate in estimate.get("candidates", []):
        show_decisions(console, candidate)
    show_notes(console, estimate)


def show_notes(console: Console, document: Mapping[str, Any]) -> None:
    for note in document.get("notes", []):
        console.print(f"[yellow]note[/] {escape(with_options(str(note)))}")


def show_stage_estimates(console: Console, estimate: Mapping[str, Any]) -> None:
    """The seconds of each stage, and their sum."""
    stages = estimate.get("stages", {})
    console.print()
    grid = table("stage", ">seconds")
    for stage, seconds in stages.items():
        grid.add_row(escape(stage), figure(seconds, 1))
    grid.add_row("total", figure(estimate.get("time_s"), 1))
    if stages:
        console.print(grid)


def show_candidate_estimates(console: Console, estimate: Mapping[str, Any]) -> None:
    """One row per recipe: its own time, with what all share the total, and its size in each format."""
    rows = list(estimate.get("candidates", []))
    console.print()
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
        console.print(f"  {counted(count, 'linear')}: {escape(text)}")


def decision_text(linear: Mapping[str, Any]) -> str:
    if linear.get("bits") is None:
        return f"unquantized, {linear.get('reason')}"
    if linear.get("scheme"):
        return str(linear["scheme"])
    return f"{linear['bits']} bits, group size {linear.get('group_size')}"


def estimate_text(name: str, value: object) -> str:
    if isinstance(value, int | float) and name.endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, int | float) and name.endswith("_s"):
        return f"about {human_seconds(value)}"
    if isinstance(value, int) and name == "parameters":
        return human_count(value)
    return escape(BASES.get(str(value), str(value)) if name == "basis" else str(value))


def human_count(count: int) -> str:
    """`5.8 million`."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return str(count)
