"""Shows a running job: a bar on a terminal, timestamped lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from app.commands.remedies import with_options
from app.commands.terminal import human_bytes, human_seconds
from app.core.records.job import Progress

LINE_STEP = 0.1  # lines in a pipe: one per tenth of the job


class ProgressView(Protocol):
    """Use it as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def count_from(self, moment: datetime) -> None:
        """Show the time since then, not since the view was opened."""

    def show(self, stage: str, progress: Progress) -> None: ...

    def note(self, message: str) -> None: ...

    def on_device(self, name: str) -> None:
        """Show from now on where the job runs."""

    def layer_done(self, layer: int, error: float) -> None:
        """Show from now on the relative output error of the layer that was finished last."""


def progress_view(console: Console) -> ProgressView:
    return BarView(console) if console.is_terminal else LineView(console)


def layers_text(progress: Progress) -> str:
    if progress.layer is None or progress.layers is None:
        return ""
    return f"layer {progress.layer}/{progress.layers}"


def use_text(progress: Progress) -> str:
    """`1.2 GB, 1.9 cores` of the newest sample; with a GPU also its memory and how busy it is."""
    use = progress.use
    if use is None:
        return ""
    text = f"{human_bytes(use.memory_bytes[-1])}, {use.cpu_cores[-1]:.1f} cores"
    if use.gpu_memory_bytes:
        text += f", GPU {human_bytes(use.gpu_memory_bytes[-1])}, {use.gpu_share[-1]:.0%} busy"
    return text


def layer_text(layer: int, error: float) -> str:
    return f"layer {layer}: error {error:.2g}"


class FactsBar(Bar):
    """A bar with a line of facts below it, cut where the terminal ends."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.facts:
            yield Text(self.facts, style="dim", no_wrap=True, overflow="ellipsis")


class TimeSince(ProgressColumn):
    """The time since the work itself began, wherever it is watched from."""

    def __init__(self) -> None:
        super().__init__()
        self.began = datetime.now(UTC)

    def render(self, task: Task) -> Text:
        seconds = max(0, round((datetime.now(UTC) - self.began).total_seconds()))
        return Text(str(timedelta(seconds=seconds)), style="progress.elapsed")


class BarView:
    """One bar, from the first news until the end; then it makes room for the outcome."""

    def __init__(self, console: Console) -> None:
        self.since = TimeSince()
        self.device = self.layer = ""
        self.bar = FactsBar(
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            self.since,
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("queued", total=1.0, detail="")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def count_from(self, moment: datetime) -> None:
        self.since.began = moment

    def show(self, stage: str, progress: Progress) -> None:
        parts = [layers_text(progress)]
        if progress.eta_s is not None:
            parts.append(f"{human_seconds(progress.eta_s)} left")
        detail = ", ".join(filter(None, parts))
        self.bar.facts = " · ".join(filter(None, (use_text(progress), self.layer, self.device)))
        self.bar.update(self.task, description=stage, completed=progress.fraction, detail=detail)
        self.bar.start()

    def note(self, message: str) -> None:
        self.bar.console.print(f"[yellow]note[/] {escape(with_options(message))}")

    def on_device(self, name: str) -> None:
        self.device = name

    def layer_done(self, layer: int, error: float) -> None:
        self.layer = layer_text(layer, error)


class LineView:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.seen: set[str] = set()
        self.next_fraction = 0.0
        self.layer = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def count_from(self, moment: datetime) -> None:
        """Lines have a time of their own."""

    def show(self, stage: str, progress: Progress) -> None:
        if stage in self.seen and progress.fraction < self.next_fraction:
            return  # stages alternate from layer to layer
        self.seen.add(stage)
        self.next_fraction = progress.fraction + LINE_STEP
        facts = (layers_text(progress), use_text(progress), self.layer)
        self.line(f"{stage} {progress.fraction:.0%} {', '.join(filter(None, facts))}".rstrip())

    def note(self, message: str) -> None:
        self.line(f"note: {with_options(message)}")

    def on_device(self, name: str) -> None:
        self.line(f"runs on {name}")

    def layer_done(self, layer: int, error: float) -> None:
        self.layer = layer_text(layer, error)

    def line(self, text: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.console.print(f"{now} {escape(text)}")
