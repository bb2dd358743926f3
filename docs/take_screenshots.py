"""Pictures of every page for the documentation, from a live service with the bundled model.

python docs/take_screenshots.py               writes docs/images/*.png; needs Chromium and the dev extra
python docs/take_screenshots.py chat compare  writes those of these pages alone
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests are not installed

from tests.e2e.installed import Service, running_service

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = Path(tempfile.gettempdir()) / "models"  # a path that may be seen on pictures
MODEL = (MODELS / "wikitext-llama-6m").as_uri()
IMAGES = Path(__file__).parent / "images"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
LOOKS = {
    "desktop": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 1.5},
}
TEXT = {"calibration": {"num_samples": 16, "sequence_length": 128}, "evaluation": {"num_samples": 16}}
JOBS = [
    {
        "recipe": [
            {"method": "rtn"},
            {"method": "awq"},
            {"method": "awq", "rounding": "gptq"},
            {"method": "awq", "rounding": "gptq", "bits": 3},
        ],
        "labels": {"team": "search"},
    },
    {
        "recipe": {"bits": 3},
        "target": {"max_perplexity_ratio": 1.003},
        "labels": {"team": "platform"},
    },
    {"recipe": {"bits": 2, "group_size": 64}, "timeout_s": 2, "labels": {"team": "search"}},
]
KEYS: list[dict[str, object]] = [
    {"name": "search team", "scopes": ["jobs:read", "jobs:write", "artifacts:read"]},
    {"name": "chat application", "scopes": ["inference"], "expires_in_s": 90 * 24 * 3600},
    {"name": "research", "scopes": ["admin"], "tenant": "research"},
]
# While the list of jobs is pictured: one runs, and others wait for it.
LIVE = [
    {
        "recipe": {"method": "omniquant", "bits": 2, "group_size": 64},
        "labels": {"team": "search", "run": "night"},
    },
    {"recipe": {"method": "gptq", "bits": 4}, "labels": {"team": "platform"}},
    {"recipe": {"method": "rtn", "bits": 8}, "priority": "low"},
]  # fmt: skip
QUESTIONS = ("Who goes there, in the middle of the night?", "My lord, tell me what the king has said")
LIMIT_S = 900.0


class Api:
    def __init__(self, service: Service) -> None:
        key = (Path(service.environment["NIBBLE_STATE_DIR"]) / "api-key").read_text().strip()
        self.client = httpx.Client(
            base_url=service.url, headers={"Authorization": f"Bearer {key}"}, timeout=120
        )

    def post(self, path: str, body: object = None) -> dict[str, str]:
        answer = self.client.post(path, json=body)
        answer.raise_for_status()
        return dict(answer.json())

    def wait(self, path: str, states: set[str]) -> dict[str, object]:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            found = dict(self.client.get(path).json())
            if found["state"] in states:
                return found
            time.sleep(1)
        raise TimeoutError(path)


def prepare(api: Api) -> dict[str, str]:
    """Jobs of several kinds and a deployment; the addresses of pages worth a picture."""
    jobs = [api.post("/v1/jobs", {"model": MODEL, **TEXT, **body}) for body in JOBS]
    ended = {"succeeded", "failed", "cancelled"}
    first = api.wait(f"/v1/jobs/{jobs[0]['id']}", ended)
    artifacts = first["artifacts"]
    assert isinstance(artifacts, list), first["error"]
    for job in jobs[1:]:
        api.wait(f"/v1/jobs/{job['id']}", ended)
    for name, original in (("wikitext-original", True), ("wikitext-w4", False)):
        served = {"artifact": artifacts[2], "name": name, "original": original}
        deployed = api.post("/v1/deployments", served)
        api.wait(f"/v1/deployments/{deployed['id']}", {"ready", "failed"})
    for body in KEYS:
        api.post("/v1/keys", body)
    return {
        "new-job": "/jobs/new",
        "job": f"/jobs/{jobs[0]['id']}",
        "answers": f"/jobs/{jobs[0]['id']}",
        "job-target": f"/jobs/{jobs[1]['id']}",
        "job-failed": f"/jobs/{jobs[2]['id']}",
        "compare": f"/compare?jobs={jobs[0]['id']},{jobs[1]['id']}",
        "artifacts": "/artifacts",
        "artifact": f"/artifacts/{artifacts[2]}",
        "chat": "/deployments/wikitext-w4/chat",
        "deployments": "/deployments",
        "deployment": "/deployments/wikitext-w4",
        "deploy": f"/artifacts/{artifacts[2]}",
        "workers": "/workers",
        "keys": "/admin/keys",
        "audit": "/admin/audit",
        "api": "/admin/keys",  # it has a page of its own, to which its action goes
    }


def run_live(api: Api) -> list[str]:
    """The jobs that are under way while the list is pictured; ids."""
    jobs = [api.post("/v1/jobs", {"model": MODEL, **body})["id"] for body in LIVE]
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        progress = api.client.get(f"/v1/jobs/{jobs[0]}").json()["progress"]
        if progress["layer"]:
            return jobs
        time.sleep(0.5)
    raise TimeoutError(jobs[0])


def chat(page: Page) -> None:
    """A conversation with the quantized model and its original beside it, and an older one."""
    page.get_by_label("Compare with").select_option("wikitext-original")
    page.get_by_text("Parameters").click()
    for field, value in (("Max tokens", "48"), ("Temperature", "0.5"), ("Seed", "5")):
        page.get_by_label(field).fill(value)
    page.get_by_text("Parameters").click()
    for question in QUESTIONS:
        page.get_by_role("button", name="New chat").click()
        page.get_by_label("Message").fill(question)
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Send").wait_for(timeout=60_000)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")


def answers(page: Page) -> None:
    """Two prompts to a job's model that is served, and to its original."""
    deployed = page.evaluate("fetch('/v1/deployments').then((answer) => answer.json())")["data"]
    served = next(each for each in deployed if each["name"] == "wikitext-w4")
    page.get_by_text("Answers beside the original").click()
    page.get_by_label("Quantized model").select_option(served["artifact"])
    for number, prompt in enumerate((*QUESTIONS, "", "", ""), 1):
        page.get_by_label(f"Prompt {number}", exact=True).fill(prompt)
    page.get_by_role("button", name="Compare answers").click()
    page.get_by_role("button", name="Stop").wait_for(state="hidden", timeout=60_000)
    page.get_by_role("button", name="Compare answers").wait_for()
    page.evaluate("document.activeElement.blur()")
    page.get_by_text("Answers beside the original").evaluate("(summary) => summary.scrollIntoView()")


# Asks for longer and longer answers, some at a time, for so many milliseconds.
LOAD = """async (lasting) => {
  const until = performance.now() + lasting;
  for (let tokens = 40; performance.now() < until; tokens = Math.min(150, tokens + 20)) {
    await Promise.all([1, 2, 3, 3, 3].map((each) => fetch("/v1/completions", {
      method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: "wikitext-w4", prompt: "The king", max_tokens: tokens * each, ignore_eos: true,
      }),
    })));
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}"""


def deployment(page: Page) -> None:
    page.get_by_role("region", name="Load").wait_for()
    page.evaluate(LOAD, 45_000)


def deploy(page: Page) -> None:
    page.get_by_role("button", name="Deploy").click()
    page.get_by_text("Options", exact=True).click()
    page.get_by_role("dialog").get_by_label("Engine").select_option("transformers")
    page.evaluate("document.activeElement.blur()")


def new_job(page: Page) -> None:
    page.get_by_role("combobox", name="Model").fill(MODEL)
    page.get_by_text("Within one percent").click()
    page.get_by_text("bits per weight").wait_for()
    page.evaluate("document.activeElement.blur()")


def take_live(browser: Browser, service: Service, api: Api) -> None:
    """The list of jobs, in every look, while one runs."""
    jobs = run_live(api)
    for look, options in LOOKS.items():
        take(browser, service, api, {"jobs": "/jobs"}, {look: options})
    for job in jobs:
        api.post(f"/v1/jobs/{job}/cancel")


def take(
    browser: Browser,
    service: Service,
    api: Api,
    pages: dict[str, str],
    looks: dict[str, dict[str, object]] = LOOKS,
) -> None:
    for look, options in looks.items():
        context = browser.new_context(**options)  # type: ignore[arg-type]  # a table of options
        page = context.new_page()
        page.goto(service.url + api.post("/v1/login-links")["path"])
        for name, path in pages.items():
            page.goto(f"{service.url}/#{path}")
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(600)
            if name in ACTIONS:
                ACTIONS[name](page)
            whole = name.startswith("job") or name in ("artifact", "compare", "deployment")
            picture = page.screenshot(full_page=whole and look != "phone")
            # 256 colours are plenty for these pages, at a third of the bytes.
            colours = Image.open(BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            colours.save(IMAGES / f"{name}-{look}.png", optimize=True)
        context.close()


def api_page(page: Page) -> None:
    page.goto(page.url.partition("#")[0] + "docs#cancel_job")
    page.get_by_text("Refusals").wait_for()
    page.evaluate("scrollTo(0, 0)")


ACTIONS = {
    "answers": answers, "chat": chat, "new-job": new_job, "deployment": deployment, "deploy": deploy,
    "api": api_page,
}  # fmt: skip


def main(names: Sequence[str]) -> None:
    """`names`: of the pages to picture; all if there are none."""
    IMAGES.mkdir(exist_ok=True)
    shutil.copytree(REPOSITORY / "examples", MODELS, dirs_exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(Path(folder), MODELS) as service,
        sync_playwright() as playwright,
    ):
        api = Api(service)
        pages = prepare(api)
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        take(browser, service, api, {name: pages[name] for name in pages if not names or name in names})
        if not names or "jobs" in names:
            take_live(browser, service, api)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
