"""`nibble open` links to pages that exist."""

from __future__ import annotations

import webbrowser
from collections.abc import Iterator

import pytest

from tests.unit.app.canned import Canned, canned_service, run
from tests.unit.app.test_cli_contract import ANSWERS


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Canned]:
    monkeypatch.setattr(webbrowser, "open", lambda link: False)
    with canned_service(dict(ANSWERS)) as canned:
        yield canned


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ((), "/jobs"),
        (("last",), "/jobs/job_1"),
        (("job_1",), "/jobs/job_1"),
        (("art_1",), "/artifacts/art_1"),
        (("tiny",), "/deployments/tiny/chat"),
        (("dep_1",), "/deployments/tiny/chat"),
    ],
)
def test_the_link_leads_to_the_page(
    words: tuple[str, ...], page: str, service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("open", *words, "--url", service.url) == 0
    assert capsys.readouterr().out == f"{service.url}/login?code=x#{page}\n"


@pytest.mark.parametrize("what", ["nope", "job_9", "art_9", "dep_9"])
def test_what_does_not_exist_has_no_link(
    what: str, service: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("open", what, "--url", service.url) == 1
    shown = capsys.readouterr()
    assert (shown.out, "not_found" in shown.err) == ("", True)
    assert not any(asked.startswith("POST") for asked, _, _ in service.requests)
