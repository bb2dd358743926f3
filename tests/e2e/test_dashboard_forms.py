"""The dashboard's forms in Chromium: what is refused, corrected, hidden, and run again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from app.core.jobs.job_store import JobStore
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Problem, transition
from app.core.records.specs import JobSpec
from tests.e2e.dashboard_visit import Visit, call, job_store, login_path, needs_chromium
from tests.e2e.history import record
from tests.e2e.installed import Service
from tests.e2e.results import finished

pytestmark = needs_chromium


def test_a_refusal_goes_with_its_cause(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    model = page.get_by_role("combobox", name="Model")
    expect(model).to_be_focused()
    model.fill(example_model.as_uri())
    page.get_by_text("Target, text, limits").click()
    # The estimate is not there yet when the form is sent.
    page.route("**/v1/estimates", lambda route: route.abort())
    page.get_by_label("Time limit").fill("0")
    page.get_by_role("button", name="Submit job").click()
    refused = page.get_by_text("The job was refused")
    expect(refused).to_be_visible()
    expect(page.locator(".field-bad")).to_contain_text("Time limit")
    expect(page.get_by_role("alert").first).not_to_contain_text("openapi.json")
    page.get_by_label("Time limit").fill("600")
    expect(refused).to_have_count(0)
    expect(page.locator(".field-bad")).to_have_count(0)
    visit.forgive_network()


def test_what_would_be_refused_cannot_be_submitted(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    submit = page.get_by_role("button", name="Submit job")
    page.get_by_role("combobox", name="Model").fill(example_model.as_uri())
    page.get_by_text("Target, text, limits").click()
    page.get_by_label("Time limit").fill("0")
    expect(submit).to_be_disabled()
    expect(page.get_by_text("Correct what is marked first.")).to_be_visible()
    page.get_by_label("Time limit").fill("60")
    expect(submit).to_be_enabled()
    page.get_by_label("Labels").fill("justalabel")
    expect(page.locator(".field-bad")).to_contain_text("write key=value")
    expect(submit).to_be_disabled()
    page.get_by_label("Labels").fill("team=search")
    expect(submit).to_be_enabled()
    assert visit.faults() == []


def test_a_folder_is_a_model(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    with page.expect_request("**/v1/estimates") as sent:
        page.get_by_role("combobox", name="Model").fill(str(example_model))
    assert sent.value.post_data_json["model"] == example_model.as_uri()
    expect(page.get_by_text("bits per weight")).to_be_visible()


def choice(page: Page, name: str) -> Locator:
    """The field of a recipe with this label."""
    return page.locator(".field", has=page.get_by_text(name, exact=True)).locator("select")


@pytest.mark.parametrize(
    ("method", "shown", "hidden"),
    [
        ("awq", ("Rounding", "Search", "Bits"), ()),
        ("gptq", ("Bits", "KV cache"), ("Rounding", "Search")),
        ("rtn", ("Bits", "KV cache"), ("Rounding", "Search")),
    ],
)
def test_fields_that_a_method_ignores_are_hidden(
    visit: Visit, method: str, shown: tuple[str, ...], hidden: tuple[str, ...]
) -> None:
    page = visit.open("/jobs/new")
    page.get_by_text("Customize, or compare").click()
    choice(page, "Rounding").select_option("gptq")
    choice(page, "Method").select_option(method)
    for name in shown:
        expect(choice(page, name)).to_be_visible()
    for name in hidden:
        expect(choice(page, name)).to_have_count(0)
    choice(page, "Scheme").select_option("fp8")
    expect(choice(page, "Bits")).to_have_count(0)


def test_several_recipes_in_one_job(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(example_model.as_uri())
    page.get_by_text("Customize, or compare").click()
    page.get_by_role("button", name="Add a recipe").click()
    second = page.get_by_role("group", name="Recipe 2")
    second.get_by_label("Method").select_option("rtn")
    second.get_by_label("Bits").select_option("8")
    page.get_by_role("button", name="Add a recipe").click()
    with page.expect_request(
        lambda request: request.url.endswith("/v1/estimates") and len(request.post_data_json["recipe"]) == 2
    ) as sent:
        page.get_by_role("button", name="Remove recipe 3").click()
    recipes = sent.value.post_data_json["recipe"]
    assert [(each["method"], each["bits"]) for each in recipes] == [("awq", 4), ("rtn", 8)]
    estimate = page.get_by_label("Estimate")
    expect(estimate).to_contain_text("rtn w8 g128")
    expect(estimate).to_contain_text("awq w4 g128")
    assert visit.faults() == []


DROP = """([zone, name, text]) => {
  const moved = new DataTransfer();
  moved.items.add(new File([text], name));
  document.querySelector(zone).dispatchEvent(new DragEvent("drop", { dataTransfer: moved, bubbles: true }));
}"""


def test_a_text_of_ones_own_is_dropped_and_previewed(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(example_model.as_uri())
    page.get_by_text("Target, text, limits").click()
    page.get_by_label("Tokens per window").fill("32")
    text = "The river ran past the mill and the mill stood still. " * 8
    rows = "".join(json.dumps({"text": f"{number}. {text}"}) + "\n" for number in range(20))
    page.get_by_label("Your own text").set_input_files(
        {"name": "rivers.jsonl", "mimeType": "application/jsonl", "buffer": rows.encode()}
    )
    preview = page.get_by_role("status").filter(has_text="rivers.jsonl")
    expect(preview).to_contain_text("20 documents")
    expect(preview).to_contain_text("windows of 32 tokens")
    expect(preview).to_contain_text("0. The river ran")
    reference = page.get_by_label("Calibration text").input_value()
    assert reference == call(visit.service, "/v1/datasets", method="GET")["data"][0]["reference"]
    assert visit.faults() == []
    page.evaluate(DROP, [".drop", "bad.csv", "a,b\n1\n"])
    expect(page.get_by_text("The text was not taken")).to_be_visible()
    expect(page.get_by_label("Calibration text")).to_have_value(reference)
    with page.expect_request("**/v1/estimates") as sent:
        page.get_by_label("Evaluation windows").fill("16")
    body = sent.value.post_data_json
    assert (body["calibration"]["dataset"], body["evaluation"]) == (reference, {"num_samples": 16})


def out_of_time(store: JobStore, model: str) -> str:
    spec = JobSpec.model_validate({"model": model, "timeout_s": 2})
    error = Problem(code="deadline_exceeded", message="it ran longer than 2 s", remedy="raise timeout_s")
    return record(store, spec, datetime.now(UTC), lambda job: transition(job, JobState.FAILED, error=error))


def test_a_job_that_ran_out_of_time_gets_more(visit: Visit, example_model: Path) -> None:
    """The remedy can be followed on the page that names it, also through a template."""
    with job_store(visit.service) as store:
        job = out_of_time(store, example_model.as_uri())
    page = visit.open(f"/jobs/{job}")
    expect(page.get_by_text("Run it again with more time")).to_be_visible()
    page.get_by_role("button", name="Run again with more time").click()
    limit = page.get_by_role("dialog").get_by_label("Time limit")
    expect(limit).to_have_value("4")
    limit.fill("900")
    assert visit.faults() == []
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_url(lambda url: job not in url)
    again = call(visit.service, f"/v1/jobs/{page.url.rpartition('/')[2]}", method="GET")
    assert (again["retry_of"], again["spec"]["timeout_s"]) == (job, 900)
    call(visit.service, f"/v1/jobs/{again['id']}/cancel")
    visit.open(f"/jobs/new/{job}")
    page.get_by_text("Target, text, limits").click()
    expect(page.get_by_label("Time limit")).to_have_value("2")


def test_a_result_that_was_there_before_says_so(visit: Visit, example_model: Path) -> None:
    with job_store(visit.service) as store:
        first = finished(visit.service, store, [{"method": "awq"}])
        spec = JobSpec.model_validate({"model": example_model.as_uri()})
        job = Job(
            id=new_id("job"), tenant="default", spec=spec, created_at=datetime.now(UTC),
            state=JobState.SUCCEEDED, reused_from=first,
        )  # fmt: skip
        store.create(job)
    page = visit.open(f"/jobs/{job.id}")
    expect(page.get_by_text("This result existed already.")).to_be_visible()
    page.get_by_role("button", name="Compute anew").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Compute anew")).to_be_checked()
    with page.expect_request("**/retry") as sent:
        dialog.get_by_role("button", name="Run", exact=True).click()
    assert sent.value.post_data_json["force"] is True
    page.wait_for_url(lambda url: job.id not in url)
    call(visit.service, f"/v1/jobs/{page.url.rpartition('/')[2]}/cancel")


def test_a_service_that_is_away_does_not_refuse(visit: Visit, example_model: Path) -> None:
    """On a page that polls nothing: a banner, no word of a refusal, and a way back at once."""
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(example_model.as_uri())
    expect(page.get_by_text("bits per weight")).to_be_visible()
    page.context.set_offline(True)
    page.get_by_text("Small", exact=True).click()
    expect(page.get_by_text("The service has not answered since")).to_be_visible()
    page.get_by_role("button", name="Submit job").click()
    expect(page.get_by_text("Not submitted")).to_be_visible()
    assert "refused" not in page.locator("main").inner_text()
    assert "Failed to fetch" not in page.locator("main").inner_text()
    assert visit.faults() == []
    page.context.set_offline(False)
    page.get_by_role("button", name="Try now").click()
    expect(page.get_by_text("The service has not answered since")).to_have_count(0)
    expect(page.get_by_label("Estimate")).to_contain_text("w3")
    visit.forgive_network()


def test_an_old_login_link_is_a_page_or_the_dashboard(browser: Browser, service: Service) -> None:
    link = service.url + login_path(service)
    page = browser.new_page()
    page.goto(link)
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    page.goto(link)
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    stranger = browser.new_context().new_page()
    stranger.goto(link)
    expect(stranger.get_by_role("heading", level=1)).to_have_text("This login link has expired")
    expect(stranger.get_by_text("nibble login")).to_be_visible()
    stranger.get_by_role("link", name="Sign in").click()
    field = stranger.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("nib_wrong")
    stranger.get_by_role("button", name="Sign in").click()
    expect(stranger.get_by_role("alert")).to_contain_text("Check that the whole key was copied")
    field.fill("nib_other")
    expect(stranger.get_by_role("alert")).to_have_count(0)
    stranger.close()
    page.close()


# Fields of a job's body without one in the form, and why.
WITHOUT_FIELD = {
    "calibration.texts": "a text is uploaded, which gives a reference",
    "evaluation.texts": "a text is uploaded, which gives a reference",
    "deploy.vllm": "the options that the deployments' dialog has; others by the API",
}


def leaves(schema: dict[str, Any], schemas: dict[str, Any], path: str = "") -> Iterator[str]:
    """The paths of all fields below a schema; of lists, those of their entries."""
    if "$ref" in schema:
        yield from leaves(schemas[schema["$ref"].rsplit("/", 1)[1]], schemas, path)
    elif "properties" in schema:
        for name, inner in schema["properties"].items():
            yield from leaves(inner, schemas, f"{path}.{name}" if path else name)
    elif "items" in schema and any(key in schema["items"] for key in ("$ref", "properties")):
        yield from leaves(schema["items"], schemas, path)
    elif branches := [each for each in schema.get("anyOf", []) if each.get("type") != "null"]:
        for branch in branches:
            yield from leaves(branch, schemas, path)
    else:
        yield path


def fields_of_the_form(page: Page) -> set[str]:
    paths = page.locator("[data-path]").evaluate_all("nodes => nodes.map((node) => node.dataset.path)")
    return {re.sub(r"\.\d+", "", path) for path in paths}


def test_every_field_of_a_jobs_body_has_one_in_the_form(visit: Visit) -> None:
    page = visit.open("/jobs/new")
    page.get_by_text("Customize, or compare").click()
    page.get_by_text("Search, exceptions").click()
    page.get_by_role("button", name="Add an exception").click()
    page.get_by_text("Target, text, limits").click()
    for label in ("Deploy as", "Push to", "Webhook"):
        page.get_by_label(label, exact=True).fill("https://example.org/x")
    page.get_by_text("How it is served").click()
    shown = fields_of_the_form(page)
    choice(page, "Search").select_option("evolutionary")
    shown |= fields_of_the_form(page)
    choice(page, "Method").select_option("omniquant")
    shown |= fields_of_the_form(page)
    choice(page, "Engine").select_option("transformers")
    shown |= fields_of_the_form(page)
    document = call(visit.service, "/openapi.json", method="GET")
    schemas = document["components"]["schemas"]
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    wanted_paths = set(leaves(body, schemas))
    assert {"recipe.bits", "recipe.overrides.match", "webhook.url", "hub_token", "labels"} <= wanted_paths
    excused = {path for path in wanted_paths if any(path.startswith(name) for name in WITHOUT_FIELD)}
    assert wanted_paths - shown - excused == set()
    assert {
        name for name in WITHOUT_FIELD if not any(path.startswith(name) for path in wanted_paths)
    } == set()
    assert visit.faults() == []


def test_what_the_form_is_filled_with_is_what_is_sent(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    page.get_by_role("combobox", name="Model").fill(str(example_model))
    page.get_by_text("Customize, or compare").click()
    page.get_by_text("Search, exceptions").click()
    page.get_by_label("Kept as they are").fill("lm_head, re:.*layers\\.[0-9]{1,2}\\.self_attn\\.o_proj")
    page.get_by_label("Clip outliers").select_option("no")
    page.get_by_role("button", name="Add an exception").click()
    page.get_by_label("Linears").fill("down_proj")
    page.get_by_label("Their bits").select_option("8")
    page.get_by_text("Target, text, limits").click()
    for label, text in {
        "Max size of the files": "1GB", "Calibration windows": "4", "Tokens per window": "32",
        "Evaluation windows": "4", "Tasks": "builtin:continuation", "Documents per task": "8",
        "Deploy as": "mine", "Push to": "me/mine",
        "Webhook": "https://93.184.216.34/told", "Hub token": "hf_x", "Labels": "team=search",
    }.items():  # fmt: skip
        page.get_by_label(label, exact=True).fill(text)
    page.get_by_label("If nothing meets it").select_option("publish")
    choice(page, "Chat template").select_option("never")
    page.get_by_label("Served on").select_option("h100")
    page.get_by_label("Branch").fill("w4")
    page.get_by_label("Private, if it is new").uncheck()
    page.get_by_label("job.started").check()
    page.get_by_text("How it is served").click()
    with page.expect_request(
        lambda request: request.url.endswith("/v1/estimates") and "replicas" in str(request.post_data)
    ) as sent:
        page.get_by_label("Replicas").fill("2")
    body = sent.value.post_data_json
    assert body["recipe"]["ignore"] == ["lm_head", "re:.*layers\\.[0-9]{1,2}\\.self_attn\\.o_proj"]
    assert body["recipe"]["overrides"] == [{"match": "down_proj", "bits": 8}]
    assert body["recipe"]["search"] == {"strategy": "grid", "duo_scaling": "both", "clip": False}
    assert body["target"] == {"max_size": "1GB", "on_miss": "publish"}
    assert body["calibration"] == {
        "dataset": "builtin:wikitext2", "num_samples": 4, "sequence_length": 32, "chat_template": "never",
        "all_experts": False,
    }  # fmt: skip
    assert body["evaluation"] == {"num_samples": 4, "tasks": ["builtin:continuation"], "task_limit": 8}
    assert body["deploy"] == {"name": "mine", "engine": "auto", "replicas": 2, "aliases": []}
    assert body["push"] == {"repo_id": "me/mine", "revision": "w4", "private": False}
    assert body["webhook"]["events"] == ["job.succeeded", "job.failed", "job.cancelled", "job.started"]
    assert (body["hub_token"], body["serve_on"], body["labels"]) == ("hf_x", "h100", {"team": "search"})
    answer = sent.value.response()
    assert answer is not None
    assert answer.status == 200, answer.text()


def test_a_model_is_chosen_by_keyboard_from_what_there_is(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    model = page.get_by_role("combobox", name="Model")
    expect(model).to_be_focused()
    expect(page.get_by_role("listbox", name="Models")).to_have_count(0)
    model.press_sequentially("wikitext")
    options = page.get_by_role("listbox", name="Models").get_by_role("option")
    expect(options.filter(has_text=str(example_model))).to_have_count(1)
    expect(model).to_have_attribute("aria-expanded", "true")
    count = options.count()
    for _ in range(count):
        model.press("ArrowDown")
        active = page.locator(f"#{model.get_attribute('aria-activedescendant')}")
        expect(active).to_have_attribute("aria-selected", "true")
        if str(example_model) in active.inner_text():
            break
    assert visit.faults() == []
    model.press("Enter")
    expect(model).to_have_value(str(example_model))
    expect(page.get_by_role("listbox", name="Models")).to_have_count(0)
    expect(page.get_by_text("bits per weight")).to_be_visible()
    # Escape leaves what is typed.
    model.fill("wiki")
    expect(options.first).to_be_visible()
    model.press("Escape")
    expect(page.get_by_role("listbox", name="Models")).to_have_count(0)
    expect(model).to_have_value("wiki")
    # On the way to it the text is a name on a hub, which the estimate does not reach from here.
    assert all("503" in complaint for complaint in visit.complaints)
    visit.complaints.clear()


def test_models_with_odd_names_are_shown_and_lead_where_they_say(visit: Visit) -> None:
    references = ["file:///models/50%25%20of%23it", "file:///models/%FF"]
    listed = [{"object": "source", "reference": each, "origin": "folder"} for each in references]
    page = visit.page
    page.route("**/v1/sources*", lambda route: route.fulfill(json={"data": listed, "hub": "not_asked"}))
    visit.open("/jobs/new")
    model = page.get_by_role("combobox", name="Model")
    model.click()
    options = page.get_by_role("option")
    expect(options).to_contain_text(["/models/50% of#it", "/models/%FF"])
    with page.expect_request("**/v1/estimates") as request:
        options.first.dispatch_event("mousedown")
    expect(model).to_have_value("/models/50% of#it")
    assert request.value.post_data_json["model"] == references[0]
    # An address that stands for no text is a page like others, and no blank one.
    visit.open("/deployments/%FF")
    expect(page.get_by_text("There is no such deployment")).to_be_visible()


def test_what_is_pasted_beyond_a_sweep_is_said_to_be_left_out(visit: Visit) -> None:
    page = visit.open("/jobs/new")
    pasted = "\n\n".join(f"file:///nowhere/{number % 18}" for number in range(40))
    page.get_by_role("combobox", name="Model").evaluate(
        """(field, text) => {
          const clipboardData = new DataTransfer();
          clipboardData.setData("text/plain", text);
          const pasted = { clipboardData, bubbles: true, cancelable: true };
          field.dispatchEvent(new ClipboardEvent("paste", pasted));
        }""",
        pasted,
    )
    expect(page.get_by_role("combobox", name=re.compile("Model"))).to_have_count(16)
    expect(page.get_by_text("the last 2 of those that were pasted are left out")).to_be_visible()
    page.get_by_role("button", name="Remove model 16").click()
    expect(page.get_by_text("are left out")).to_have_count(0)


def test_a_sweep_over_models_and_what_is_refused_of_it(visit: Visit, example_model: Path) -> None:
    page = visit.open("/jobs/new")
    model = page.get_by_role("combobox", name="Model", exact=True)
    model.fill(example_model.as_uri())
    page.get_by_role("button", name="Add a model").click()
    page.get_by_role("combobox", name="Model 2").fill("file:///nowhere/else")
    estimate = page.get_by_label("Estimate")
    expect(estimate).to_contain_text("2 jobs")
    expect(estimate).to_contain_text("of weights")
    expect(estimate).to_contain_text("would be refused")
    page.get_by_label("Name of the sweep").fill("mine")
    page.get_by_text("Target, text, limits").click()
    page.get_by_label("Deploy as").fill("one")
    expect(page.get_by_text("names one result: leave it empty")).to_be_visible()
    page.get_by_label("Deploy as").fill("")
    page.get_by_label("Labels").fill("team=search")
    assert visit.faults() == []
    page.get_by_role("button", name="Submit 2 jobs").click()
    told = page.get_by_role("alert").filter(has_text="1 of 2 jobs were not submitted")
    expect(told).to_contain_text("submitted as job_")
    expect(told).to_contain_text("/nowhere/else")
    # Another second model: the first one was submitted already, under the same key.
    page.get_by_role("combobox", name="Model 2").fill(f"{example_model.as_uri()}/")
    expect(page.get_by_role("button", name="Submit 2 jobs")).to_have_count(0)  # it is the first one again
    page.get_by_role("combobox", name="Model 2").fill(
        f"{example_model.parent.as_uri()}/./{example_model.name}"
    )
    page.get_by_role("button", name="Submit 2 jobs").click()
    page.wait_for_url("**/#/jobs?q=sweep%3Dmine")
    rows = page.locator("li[data-job]")
    expect(rows).to_have_count(2)
    for row in rows.all():
        expect(row).to_contain_text("sweep=mine")
        expect(row).to_contain_text("team=search")
