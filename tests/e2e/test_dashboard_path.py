"""A newcomer in Chromium: own text, three recipes, the best beside its original, and all of it removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.dashboard_visit import Visit, call, needs_chromium

pytestmark = needs_chromium

TEXT = "The river ran past the mill, and the mill stood still beside the road. "


def sweep(page: Page, model: str) -> None:
    """Three recipes on an own text, from an empty form."""
    page.get_by_role("link", name="New job", exact=True).click()
    expect(page.get_by_role("combobox", name="Model")).to_be_focused()
    page.keyboard.type(model)
    page.get_by_text("Customize, or compare").click()
    for _ in range(2):
        page.get_by_role("button", name="Add a recipe").click()
    second, third = (page.get_by_role("group", name=f"Recipe {number}") for number in (2, 3))
    second.get_by_label("Method").select_option("rtn")
    third.get_by_label("Method").select_option("rtn")
    third.get_by_label("Bits").select_option("8")
    page.get_by_text("Target, text, limits").click()
    page.get_by_label("Calibration windows").fill("4")
    page.get_by_label("Tokens per window").fill("64")
    page.get_by_label("Evaluation windows").fill("2")
    rows = "".join(json.dumps({"text": f"{number}. {TEXT * 6}"}) + "\n" for number in range(20))
    page.get_by_label("Your own text").set_input_files(
        {"name": "rivers.jsonl", "mimeType": "application/jsonl", "buffer": rows.encode()}
    )
    expect(page.get_by_text("20 documents")).to_be_visible()
    page.get_by_role("button", name="Submit job").click()


@pytest.mark.timeout(480)
def test_a_newcomers_path(visit: Visit, example_model: Path) -> None:
    page = visit.page
    sweep(page, str(example_model))
    expect(page.get_by_label("Progress", exact=True)).to_be_visible()
    result = page.get_by_role("region", name="Result")
    expect(result).to_contain_text("of 3 recipes", timeout=240_000)
    job = page.url.rpartition("/")[2]
    spec = call(visit.service, f"/v1/jobs/{job}", method="GET")["spec"]
    assert spec["calibration"]["dataset"].startswith("upload:")
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.get_by_label(f"Select {job}").check()
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_role("region", name="All candidates").get_by_role("row")).to_have_count(1 + 3)
    page.get_by_role("link", name=job[-5:]).first.click()
    result.get_by_role("button", name="Deploy").click()
    page.get_by_role("dialog").get_by_label("Model name").fill("the-best")
    page.get_by_role("dialog").get_by_role("button", name="Deploy").click()
    page.get_by_role("link", name="Chat").click(timeout=120_000)
    page.get_by_text("Parameters").click()
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("Message").fill("The river")
    page.keyboard.press("Enter")
    expect(page.locator(".message-assistant")).to_contain_text("8 tokens")
    visit.open(f"/jobs/{job}")
    expect(result).to_contain_text("tokens/s")
    talk_beside_the_original(page)
    remove_all(visit, job)


def talk_beside_the_original(page: Page) -> None:
    """On the job's page: the original is served for it, and answers the same question."""
    page.get_by_text("Answers beside the original").click()
    for number, prompt in enumerate(("The river", "", "", "", ""), 1):
        page.get_by_label(f"Prompt {number}", exact=True).fill(prompt)
    page.get_by_role("button", name="Serve the original and compare").click()
    pair = page.get_by_role("group", name="Answers to prompt 1")
    for side in ("Original", "Quantized"):
        answer = pair.locator(".message").filter(has_text=side)
        expect(answer).to_contain_text("per second", timeout=120_000)


def remove_all(visit: Visit, job: str) -> None:
    """The deployments, the artifacts and the job, each on its page."""
    page = visit.page
    artifacts = call(visit.service, f"/v1/jobs/{job}", method="GET")["artifacts"]
    visit.open("/deployments")
    for name in ("the-best", "-original-"):
        card = page.get_by_role("article").filter(has_text=name)
        card.get_by_role("button", name="Delete").click()
        card.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(card).to_have_count(0)
    for artifact in artifacts:
        visit.open(f"/artifacts/{artifact}")
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Artifacts")
    visit.open(f"/jobs/{job}")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Jobs")
    expect(page.locator(f"[data-job={job}]")).to_have_count(0)
