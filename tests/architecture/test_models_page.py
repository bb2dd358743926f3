"""The page of model types is that of the measured results, and covers every known type."""

from __future__ import annotations

import json

from app.core.deployments.served_families import unserved
from app.core.formats.compressed_tensors import unopened_types
from app.core.planning.family import known_types
from tests.families.page import PAGE, unopened, written
from tests.families.table import RESULTS, ROUNDED, is_right


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text("utf-8") == written()


def test_the_results_are_those_of_the_known_types_and_decide_what_callers_are_told() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    assert set(results) == known_types()
    assert unopened_types() == unopened(results)
    assert unserved() == {n: row["served"] for n, row in results.items() if isinstance(row["served"], str)}
    good = [row for row in results.values() if is_right(row)]
    assert len(good) >= 150
    assert all(
        row["self_check"] <= 2e-6 for name, row in results.items() if is_right(row) and name not in ROUNDED
    )
