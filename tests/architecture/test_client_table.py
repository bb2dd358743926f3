"""The guide's table of clients says what the clients said."""

from __future__ import annotations

import json

import pytest

from tests.clients.results import CLIENTS, REFUSALS, VERSIONS, Client, guide_table, recorded, table

ANYWHERE = ("chat", "tools: named")  # each does one of them


def pinned(client: Client) -> str:
    """The version by which the client is installed."""
    package = client.title.split("`")[1]
    if client.is_node:
        return str(json.loads((VERSIONS / client.pins / "package.json").read_text())["dependencies"][package])
    lines = (VERSIONS / f"{client.pins}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def test_the_guide_says_what_clients_got() -> None:
    assert guide_table() == table(recorded())


def test_all_pins_are_of_a_client_that_is_run() -> None:
    names = {path.name.removesuffix(".txt") for path in VERSIONS.iterdir()}
    others = {"generators", "generators-node", "redis-6.2", "valkey-9.0"}
    assert names | {"openai-3"} == {client.pins for client in CLIENTS} | others


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.pins)
def test_each_client_was_run_and_all_but_what_is_refused_works(client: Client) -> None:
    result = recorded()[client.pins]
    assert any(name in result.features for name in ANYWHERE)
    for feature, verdict in result.features.items():
        assert (verdict == "ok") == (feature not in REFUSALS), (feature, verdict)
        assert verdict != "failed"
    if client.pins != "openai-3":  # which is in the environment of the tests
        assert result.version == pinned(client)
