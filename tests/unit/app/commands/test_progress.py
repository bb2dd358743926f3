from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from app.commands.progress import progress_view
from app.core.records.job import Progress, ResourceUse


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


def used(*, gpu: bool = False) -> Progress:
    device = {"gpu_memory_bytes": (8 * 10**9,), "gpu_share": (0.97,)} if gpu else {}
    now = datetime.now(UTC)
    use = ResourceUse(
        began_at=now, every_s=2, memory_bytes=(10**9, 12 * 10**8), cpu_cores=(0.5, 1.92), **device
    )
    return Progress(fraction=0.5, layer=4, layers=8, use=use)


def test_a_terminal_of_80_columns_shows_use_device_and_the_last_layers_error_below_the_bar() -> None:
    out = io.StringIO()
    with progress_view(Console(file=out, force_terminal=True, width=80)) as view:
        view.on_device("Xeon")
        view.layer_done(3, 0.0123)
        view.show("searching", used())
    lines = out.getvalue().splitlines()
    assert any("1.2 GB, 1.9 cores · layer 3: error 0.012 · Xeon" in line for line in lines)
    assert any("searching" in line and "50%" in line and "layer 4/8" in line for line in lines)


def test_a_pipe_says_the_device_once_and_use_and_error_with_each_line() -> None:
    out = io.StringIO()
    with progress_view(Console(file=out, width=200)) as view:
        view.on_device("NVIDIA [H100] (host-1)")
        view.layer_done(3, 0.0123)
        view.show("searching", used(gpu=True))
    assert [line.partition("Z ")[2] for line in out.getvalue().splitlines()] == [
        "runs on NVIDIA [H100] (host-1)",
        "searching 50% layer 4/8, 1.2 GB, 1.9 cores, GPU 8.0 GB, 97% busy, layer 3: error 0.012",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_note_names_options(*, is_terminal: bool) -> None:
    written = io.StringIO()
    with progress_view(Console(file=written, force_terminal=is_terminal, width=100, highlight=False)) as view:
        view.note("raise evaluation.num_samples")
    assert "raise --eval-samples" in written.getvalue()
