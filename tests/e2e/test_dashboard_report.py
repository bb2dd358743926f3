"""The dashboard's pages of jobs and artifacts in Chromium: what was won, the plot, the live run, phones."""

from __future__ import annotations

import itertools

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.dashboard_visit import Visit, job_store, needs_chromium
from tests.e2e.installed import Service
from tests.e2e.results import LAYERS, finished, forget, layer_done, running

pytestmark = needs_chromium

BOXES = """nodes => nodes.map((node) => {
  const { left, top, right, bottom } = node.getBoundingClientRect();
  return [node.dataset.name, left, top, right, bottom];
})"""


def boxes(page: Page, selector: str) -> dict[str, tuple[float, float, float, float]]:
    return {name: tuple(box) for name, *box in page.locator(selector).evaluate_all(BOXES)}


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_a_finished_job_opens_with_what_was_won(visit: Visit) -> None:
    with job_store(visit.service) as store:
        job = finished(visit.service, store)
    page = visit.open(f"/jobs/{job}")
    result = page.get_by_role("region", name="Result")
    # The smallest within a percent of the original's perplexity.
    expect(result).to_contain_text("2.5× smaller")
    expect(result).to_contain_text("11.5 MB → 4.6 MB")
    expect(result).to_contain_text("16 windows of 128 tokens")
    for text in ("+0.29 %", "\N{MINUS SIGN}0.31 % to +0.89 %", "within the noise", "0.004", "96.0 %"):
        expect(result).to_contain_text(text)
    top = result.bounding_box()
    assert top is not None
    assert top["y"] < 300
    candidates = page.get_by_role("region", name="Candidates")
    expect(candidates).to_contain_text("\N{MINUS SIGN}0.27 %")
    expect(candidates.get_by_text("within the noise")).to_have_count(3)
    expect(page.get_by_text("compare the KL")).to_be_visible()
    # One word for one size: weights here, all files at the artifact.
    expect(candidates.get_by_role("columnheader", name="Weights")).to_be_visible()
    expect(page.locator(".heat rect")).to_have_count(4 * LAYERS)
    # Time and memory beside the estimate.
    stages = page.get_by_role("region", name="Time per stage")
    expect(stages.get_by_role("row", name="total 10 s 12 s")).to_have_count(1)
    expect(page.get_by_text("1.0 GB, estimated 900 MB")).to_be_visible()
    expect(page.get_by_text("1.9 cores on average")).to_be_visible()
    assert visit.faults() == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 2560])
def test_names_stay_with_their_points(browser: Browser, service: Service, width: int) -> None:
    with job_store(service) as store:
        job = finished(service, store)
    visit = Visit(browser, service, viewport={"width": width, "height": 900})
    page = visit.open(f"/jobs/{job}")
    expect(page.locator(".point")).to_have_count(7)
    points, names = boxes(page, ".point"), boxes(page, ".point-name")
    drawing = page.locator(".quality").bounding_box()
    assert drawing is not None
    assert {"original", "gptq w2 g128"} <= set(names)
    for one, other in itertools.combinations(names.values(), 2):
        assert not overlap(one, other)
    for name, box in names.items():
        assert drawing["x"] <= box[0]
        assert box[2] <= drawing["x"] + drawing["width"] + 1
        centre = [(points[name][0] + points[name][2]) / 2, (points[name][1] + points[name][3]) / 2]
        gap = max(box[0] - centre[0], centre[0] - box[2], 0) + max(box[1] - centre[1], centre[1] - box[3], 0)
        assert gap < 60, name
    legend = page.locator(".legend li")
    assert legend.count() == 7
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.close()
    assert visit.complaints == []


def test_every_recipe_has_a_look_of_its_own(visit: Visit) -> None:
    """As many recipes as a job may have."""
    recipes = [
        {"method": method, "bits": bits}
        for method in ("rtn", "awq", "gptq", "omniquant")
        for bits in (2, 3, 4, 8)
    ]
    with job_store(visit.service) as store:
        job = finished(visit.service, store, recipes)
    page = visit.open(f"/jobs/{job}")
    looks = page.locator(".legend li svg")
    expect(looks).to_have_count(1 + len(recipes))
    drawn = looks.evaluate_all("nodes => nodes.map((node) => node.innerHTML)")
    assert len(set(drawn)) == len(drawn)


def test_a_running_job_is_followed(visit: Visit) -> None:
    with job_store(visit.service) as store:
        job = running(store, layers=2)
    page = visit.open(f"/jobs/{job}")
    progress = page.get_by_label("Progress", exact=True)
    expect(progress).to_contain_text("Elapsed")
    expect(progress).to_contain_text("here-1")
    expect(progress).to_contain_text("Last note: down_proj keeps its precision")
    log = page.get_by_role("log")
    expect(log).to_contain_text("layer 1 of recipe 0 is done, relative output error 0.02")
    figure = page.locator("figure", has_text="Error per layer, as the layers are done")
    figure.get_by_text("Numbers").click()
    expect(figure.locator("details").get_by_role("row")).to_have_count(1 + 2)
    # What its process uses: the newest sample in words, all of them as curves.
    for text in ("1.2 GB, at most 1.4 GB", "1.9 cores", "8.0 GB, 97 % busy"):
        expect(progress).to_contain_text(text)
    for title, newest in (
        ("Memory of the job", "1.2"),
        ("Processor cores in use", "1.9"),
        ("How busy the GPU is", "97"),
    ):
        curve = page.locator("figure", has_text=title)
        curve.get_by_text("Numbers").click()
        expect(curve.locator("details").get_by_role("row")).to_have_count(1 + 3)
        expect(curve.locator("details").get_by_role("row", name=newest)).to_have_count(1)
    elapsed = page.get_by_text("Elapsed").locator("xpath=following-sibling::dd")
    before = elapsed.inner_text()
    with job_store(visit.service) as store:
        layer_done(store, job, 2)
    expect(figure.locator("details").get_by_role("row")).to_have_count(1 + 3)
    expect(log).to_contain_text("layer 2 of recipe 0")
    expect(elapsed).not_to_have_text(before)
    assert visit.faults() == []
    # Away: nothing goes on, so no time is left and none passes.
    page.context.set_offline(True)
    expect(page.get_by_role("button", name="Try now")).to_be_visible()
    expect(page.get_by_text("Time left")).to_have_count(0)
    page.context.set_offline(False)
    page.get_by_role("button", name="Try now").click()
    expect(page.get_by_text("Time left")).to_be_visible()
    with job_store(visit.service) as store:
        forget(store, job)
    visit.forgive_network()


def test_tables_can_be_read_on_a_phone(browser: Browser, service: Service) -> None:
    """The file table of an artifact, with digests of 64 characters."""
    visit = Visit(browser, service, viewport={"width": 360, "height": 800})
    digest = "0123456789abcdef" * 4
    artifact = {
        "object": "artifact", "id": "art_01M8ERG05NKHQNMYA0VV1Z5G1N", "job": "job_01M8ERG05NKHQNMYA0VV1Z5G1N",
        "created_at": "2026-11-28T10:00:00Z", "model": "hf:ours/small", "model_digest": digest,
        "recipe": {"method": "awq", "bits": 4, "group_size": 128}, "format": "awq", "size": 4_800_000,
        "summary": {"label": "awq w4 g128", "bytes": 4_600_000, "bits_per_weight": 4.2},
        "files": [{"path": f"file-{n}.json", "size": 10, "sha256": digest} for n in range(3)],
        "tags": [], "pushes": [], "links": {},
    }  # fmt: skip
    visit.page.route("**/v1/artifacts/art_*", lambda route: route.fulfill(json=artifact))
    page = visit.open(f"/artifacts/{artifact['id']}")
    cell = page.get_by_role("cell", name=digest).first.locator("code")
    box = cell.bounding_box()
    assert box is not None
    assert box["width"] > 250
    assert box["height"] < 90
    expect(page.get_by_text("4.8 MB, 4.6 MB of them weights")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert visit.faults() == []
    page.close()
    assert visit.complaints == []


@pytest.mark.parametrize("width", [320, 2560])
def test_pages_fit_the_screen(browser: Browser, service: Service, width: int) -> None:
    with job_store(service) as store:
        job = finished(service, store)
    visit = Visit(browser, service, viewport={"width": width, "height": 800})
    for path in ("/jobs", "/jobs/new", f"/jobs/{job}", f"/compare?jobs={job}", "/artifacts", "/deployments"):
        page = visit.open(path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        expect(page.locator(".loading")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, path
        main = page.locator("main").bounding_box()
        assert main is not None
        assert main["width"] > 0.69 * width, path
    visit.page.close()
    assert visit.complaints == []
