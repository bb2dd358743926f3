"""`nibble quantize`: runs the engine in the foreground, without a service."""

from __future__ import annotations

import importlib.util
import json
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from app.commands import job_options
from app.commands.checks.devices import chosen_device
from app.commands.progress import ProgressView, progress_view
from app.commands.show import show_report
from app.commands.terminal import AsJson, print_json, read_settings, stderr, stdout
from app.core.errors import InvalidRequest, JobFault, field_fault, field_path
from app.core.faults.system_faults import STATE_FOLDER
from app.core.records.job import Problem, Progress
from app.core.records.specs import JobSpec

if TYPE_CHECKING:
    from app.core.child.assignment import Assignment, Finished, OutputFolder

CHILD_GRACE_S = 10.0
# Remedies of a child's faults, where no service has events, workers or retries.
REMEDIES = {
    "child_crashed": "read its output above, then run it again",
    "child_killed": "find out who sends signal 9 on this host (an operator, a limit of the container)",
    "child_protocol": "report this with the output above",
    "device_failed": "look for Xid lines in the kernel log of this host, then run it again",
    "internal": "this is a fault of Nibble: please report it with the output above",
    "kernel_backend_absent": "set NIBBLE_KERNEL_BACKEND to auto",
    "out_of_memory": "use a device or host with more memory, or lower --num-samples or --sequence-length",
}
# Fields of a job that only a service supports.
OF_A_SERVICE = frozenset({"deploy", "force", "labels", "priority", "queue_timeout_s", "timeout_s", "webhook"})


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a reference as for submit.")],
    *,
    options: job_options.JobOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Quantize a model on this machine, without a service."""
    body = job_options.job_body(model, options)
    refuse_missing_engine()
    refuse_used_folder(out)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    # The default action of SIGTERM would leave the temporary folder behind.
    signal.signal(signal.SIGTERM, lambda number, frame: exit_on_signal(number))
    with tempfile.TemporaryDirectory(prefix=".nibble-", dir=out.parent) as work:
        report = run(read_job_spec(body), Path(work), out, device=device, quiet=as_json)
    if as_json:
        print_json(report)
        return
    console = stdout()
    show_report(console, report)
    console.print(f"written to {escape(str(out))}")


def exit_on_signal(number: int) -> None:
    raise SystemExit(128 + number)


def run(spec: JobSpec, work: Path, out: Path, *, device: str, quiet: bool) -> dict[str, Any]:
    """Run the engine in `work`, move its outputs to `out`, and return the report."""
    console = stderr() if quiet else stdout()
    with progress_view(console) as view:
        view.show("fetching", Progress())
        ignored = sorted(spec.model_fields_set & OF_A_SERVICE)
        if ignored:
            view.note(f"without a service these fields have no effect: {', '.join(ignored)}")
        assignment = prepare(spec.model_copy(update={"webhook": None, "deploy": None}), work, device)
        try:
            finished = supervise(assignment, view)
        except JobFault as fault:
            keep_report(work, out, fault)
            raise
    report: dict[str, Any] = json.loads((work / finished.report).read_text())
    move_outputs(finished, work, out)
    return report


def keep_report(work: Path, out: Path, fault: JobFault) -> None:
    """Show the report of a missed target, and write it beside `out`, which stays empty."""
    from app.core.child.assignment import REPORT

    if fault.code == "target_missed" and (work / REPORT).is_file():
        report_file = out.with_name(f"{out.name}.report.json")
        (work / REPORT).replace(report_file)
        show_report(stderr(), json.loads(report_file.read_text("utf-8")))
        stderr().print(f"report written to {escape(str(report_file))}")


def refuse_missing_engine() -> None:
    if importlib.util.find_spec("torch") is None:
        raise InvalidRequest(
            "the engine is not installed", code="engine_missing", remedy="pip install 'nibble[worker]'"
        )


def refuse_used_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(
            f"{out} is not an empty folder",
            code="output_exists",
            remedy="name a new folder: nothing is overwritten",
        )


def read_job_spec(body: dict[str, Any]) -> JobSpec:
    try:
        return JobSpec.model_validate(body)
    except ValidationError as fault:
        first = fault.errors()[0]
        param = field_path(first["loc"])
        message = f"{param}: {field_fault(first)}"
        raise InvalidRequest(message, remedy="correct this field", param=param) from fault


def prepare(spec: JobSpec, work: Path, device: str) -> Assignment:
    """Check the job as the service would, fetch its model and texts, and return the assignment."""
    from app.core.child.assignment import CHECKPOINTS, Assignment
    from app.core.child.task_process import fetch_task_data
    from app.core.jobs.submission import check_submission
    from app.core.sources.fetching import ModelCache, fetch_texts

    # Users may read any file that they can read, including links such as those in the hub's cache.
    settings = read_settings().model_copy(update={"model_roots": (Path("/"),)})
    device = chosen_device(device)
    checked = check_submission(spec, settings)
    spec = checked.spec
    with ModelCache(work / "model", settings) as cache:
        model = cache.fetch(spec.model, no_news, spec.adapter)
    texts = fetch_texts(spec, settings, work, no_news, in_place=True)
    fetch_task_data(spec.tasks, work, no_news)
    (work / CHECKPOINTS).mkdir()
    return Assignment(
        spec=spec,
        **model.assigned(),
        choices=checked.plan.choices,
        calibration_digest=texts.calibration_digest,
        calibration_file=texts.calibration,
        evaluation_file=texts.evaluation,
        work_folder=work,
        device=device,
        calibration_devices=settings.calibration_devices,
        kernel_backend=settings.kernel_backend,
    )


def no_news(count: int) -> None:
    """Ignore the progress of a fetch."""


def supervise(assignment: Assignment, view: ProgressView) -> Finished:
    """Run the job child and show its progress. Raises JobFault unless it finishes."""
    from app.core.child.job_child import JobChild

    stage, progress = "fetching", Progress()
    with JobChild(assignment) as child:
        for message in child.messages():
            if message.kind == "finished":
                return message
            if message.kind == "failed":
                raise of_terminal(message.error, assignment.work_folder, child.output_tail())
            if message.kind == "stage":
                stage = message.stage
            elif message.kind == "progress":
                progress = Progress(**message.model_dump(exclude={"kind"}))
            elif message.kind == "note":
                view.note(message.message)
            view.show(stage, progress)
        raise of_terminal(
            Problem.of(child.wait_fault(CHILD_GRACE_S)), assignment.work_folder, child.output_tail()
        )


def of_terminal(problem: Problem, work: Path, output: str) -> JobFault:
    """The fault with a remedy for the terminal; prints the child's output if the remedy refers to it."""
    remedy = REMEDIES.get(problem.code, problem.remedy.replace(STATE_FOLDER, str(work.parent)))
    if "output above" in remedy:
        stderr().print(escape(output))
    return JobFault(problem.message, code=problem.code, remedy=remedy)


def move_outputs(finished: Finished, work: Path, out: Path) -> None:
    """Move the output folders to `out` in one step, so that it is complete or absent."""
    if len(finished.outputs) == 1:
        tree = work / finished.outputs[0].folder
        (work / finished.report).replace(tree / "nibble-report.json")
    else:
        tree = work / "placed"
        tree.mkdir()
        labels = {output.recipe_index: str(output.summary["label"]) for output in finished.outputs}
        for output in finished.outputs:
            (work / output.folder).replace(tree / folder_name(output, labels))
        (work / finished.report).replace(tree / "report.json")
    tree.replace(out)


def folder_name(output: OutputFolder, labels: dict[int, str]) -> str:
    """`awq`, or with several recipes `rtn-w4-g128-awq`; a repeated label gets its number."""
    if len(labels) == 1:
        return output.format
    label = labels[output.recipe_index]
    number = f"{output.recipe_index}-" if list(labels.values()).count(label) > 1 else ""
    return f"{number}{label.replace(' ', '-')}-{output.format}"
