from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

from rich.console import Console

from app.commands.progress import progress_view
from app.core.records.job import Progress


def test_a_pipe_gets_a_line_for_each_stage_and_each_tenth() -> None:
    out = io.StringIO()
    with progress_view(Console(file=out, width=200)) as view:
        view.show("calibrating", Progress(fraction=0.0))
        view.show("calibrating", Progress(fraction=0.05, layer=1, layers=8))
        view.show("calibrating", Progress(fraction=0.12, layer=2, layers=8))
        view.show("packing", Progress(fraction=0.13))
        view.show("calibrating", Progress(fraction=0.14))
        view.show("packing", Progress(fraction=0.15))
        view.show("calibrating", Progress(fraction=0.25))
        view.note("layer [3] keeps its precision")
    lines = out.getvalue().splitlines()
    assert [line.partition("Z ")[2] for line in lines] == [
        "calibrating 0%",
        "calibrating 12% layer 2/8",
        "packing 13%",
        "calibrating 25%",
        "note: layer [3] keeps its precision",
    ]


def test_a_pipe_gets_no_control_characters() -> None:
    out = io.StringIO()
    with progress_view(Console(file=out)) as view:
        view.show("queued", Progress())
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress_view(console) as view:
        view.show("searching", Progress(fraction=0.5, layer=4, layers=8, eta_s=3.0))
        view.note("a note")
    assert "searching" in out.getvalue()
    assert "layer 4/8, 3.0 s left" in out.getvalue()
    assert "a note" in out.getvalue()


def test_the_bar_counts_from_the_start_of_the_job_and_appears_with_the_first_news() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress_view(console) as view:
        assert out.getvalue() == ""
        view.count_from(datetime.now(UTC) - timedelta(hours=1, minutes=2))
        view.show("searching", Progress(fraction=0.5))
    assert "1:02:0" in out.getvalue()
