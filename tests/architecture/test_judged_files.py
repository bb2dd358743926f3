"""The guide's table of what vLLM opens says what vLLM said."""

from __future__ import annotations

from tests.judges import cells
from tests.judges.results import guide_table, recorded, table


def test_every_cell_is_judged() -> None:
    assert set(recorded().outcomes) == {str(cell) for cell in cells.long_form()}


def test_vllm_runs_all_of_4_bits_on_a_cpu_and_nothing_else() -> None:
    for cell in cells.long_form():
        assert (recorded().outcomes[str(cell)].refusal is None) == (cell.bits == 4), cell


def test_the_guide_says_what_vllm_said() -> None:
    assert guide_table() == table(recorded(), cells.long_form())
