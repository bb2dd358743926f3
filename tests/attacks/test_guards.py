"""The table of guards keeps up with the code. `make guards` proves that each test misses its guard."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.guards import GUARDS, Guard


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.attack)
def test_guard_and_test_are_where_the_table_says(guard: Guard, repository: Path) -> None:
    assert (repository / guard.file).read_text().count(guard.before) == 1
    file, _, name = guard.test.partition("::")
    assert f"def {name}(" in (repository / file).read_text()


def test_no_attack_is_named_twice() -> None:
    assert len({guard.attack for guard in GUARDS}) == len(GUARDS)


def test_every_attack_is_in_the_documentation(repository: Path) -> None:
    page = (repository / "docs" / "security.md").read_text()
    assert [guard.attack for guard in GUARDS if f"| {guard.attack} |" not in page] == []
