"""Clients that users bring, with all that they do: it works, or is refused in the service's words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import probed
from tests.clients.results import CLIENTS, Client, Result, faults, recorded, write_result


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.pins)
def test_what_clients_bring_works(client: Client, scene: dict[str, Any], tmp_path: Path) -> None:
    document = probed(client, scene, tmp_path)
    wrong = [f"{row.feature}: {row.outcome}: {row.detail}" for row in faults(document)]
    assert not wrong, "\n\n".join(wrong)
    result = Result.of(document)
    if "RECORD" in os.environ:
        write_result(client, result)
    assert result == recorded()[client.pins]
