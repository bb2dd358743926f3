"""The guide's table of what vLLM opens says what vLLM said."""

from __future__ import annotations

from tests.judges import cells, family_results
from tests.judges.results import guide_table, recorded, table


def test_every_cell_is_judged() -> None:
    assert set(recorded().outcomes) == {str(cell) for cell in cells.long_form()}


RUN_ON_CPUS = ("w8a8", "w8a8-static", "fp8")  # schemes beside integers of 4 bits


def test_what_vllm_runs_on_a_cpu_is_what_the_guide_builds_on() -> None:
    for cell in cells.long_form():
        runs = cell.bits == 4 if cell.scheme == "wna16" else cell.scheme in RUN_ON_CPUS
        assert (recorded().outcomes[str(cell)].refusal is None) == runs, cell


def test_the_guide_says_what_vllm_said() -> None:
    assert guide_table() == table(recorded(), cells.long_form())


def test_the_guide_says_what_vllm_said_of_families() -> None:
    assert family_results.guide_table() == family_results.table(family_results.recorded())


def test_where_vllm_computes_a_family_our_files_are_within_the_tolerance() -> None:
    for model_type, outcomes in family_results.recorded().families.items():
        for name, outcome in outcomes.items():
            original = outcomes["original"]
            # In float32 a difference is no rounding: vLLM's class computes another function.
            share = 0.1 if original.dtype == "float32" else 1
            sound = (original.perplexity_off or 0) <= share * family_results.TOLERANCE
            if sound and outcome.perplexity_off is not None:
                assert outcome.near, (model_type, name)
