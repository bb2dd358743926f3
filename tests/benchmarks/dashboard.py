"""The dashboard in Chromium over 1,000 jobs: first paint, page weight, frames while scrolling, cost of polls.

python -m tests.benchmarks.dashboard [--jobs 1000] [--seconds 60]        needs Chromium and the dev extra
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

from app.core.jobs.job_store import JobStore
from app.core.records.ids import new_id
from app.core.records.job import Job, JobState, Progress, Stage, transition
from app.core.records.specs import JobSpec
from app.core.redis.redis_server import connect, resolve_redis
from app.core.settings import Settings
from tests.e2e.history import fill

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "nib_benchmark_" + "0" * 32
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-quic",
    "--no-first-run",
]
READY_LIMIT_S = 60
LOADS = 7
FRAME_MS = 1000 / 60
SCROLL_STEP = 80  # pixels in a frame: 4,800 a second

PAINTS = """() => new Promise((done) => {
  const found = {};
  new PerformanceObserver((list) => list.getEntries().forEach((each) => {
    if (each.name === "first-contentful-paint") found.first = each.startTime;
  })).observe({ type: "paint", buffered: true });
  new PerformanceObserver((list) => list.getEntries().forEach((each) => { found.largest = each.startTime; }))
    .observe({ type: "largest-contentful-paint", buffered: true });
  setTimeout(() => done(found), 300);
})"""
SCROLL = """(step) => new Promise((done) => {
  const frames = [];
  let before;
  scrollTo(0, 0);
  const next = (now) => {
    if (before !== undefined) frames.push(now - before);
    before = now;
    if (innerHeight + scrollY >= document.documentElement.scrollHeight - 2) return done(frames);
    scrollBy(0, step);
    requestAnimationFrame(next);
  };
  requestAnimationFrame(next);
})"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_api(state: Path) -> Iterator[tuple[str, JobStore]]:
    """The API process alone, and the store that it reads."""
    port = free_port()
    named = {"STATE_DIR": str(state), "PORT": str(port), "BOOTSTRAP_API_KEY": KEY}
    environment = {**os.environ, **{f"NIBBLE_{name}": value for name, value in named.items()}}
    log = (state / "api.log").open("wb")
    with resolve_redis(Settings(state_dir=state)) as redis, log:
        api = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "api"], env=environment, cwd=REPOSITORY, stdout=log, stderr=log
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await_ready(url)
            yield url, JobStore(connect(redis.url))
        finally:
            api.terminate()
            api.wait()


def await_ready(url: str) -> None:
    deadline = time.monotonic() + READY_LIMIT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the API does not become ready")


class Running:
    """A job that reports progress every `every_s` seconds, in a thread."""

    def __init__(self, store: JobStore, every_s: float) -> None:
        spec = JobSpec.model_validate({"model": "hf:Qwen/Qwen3-8B", "labels": {"team": "search"}})
        self.store, self.every_s = store, every_s
        self.id = new_id("job")
        self.over = threading.Event()
        store.create(Job(id=self.id, tenant="default", spec=spec, created_at=datetime.now(UTC)))
        store.claim(self.id, 1, worker="benchmark", lease_s=3600)
        self.thread = threading.Thread(target=self.report)

    def report(self) -> None:
        for step in itertools.count(1):
            if self.over.wait(self.every_s):
                return
            progress = Progress(fraction=min(0.99, step / 500), layer=step, layers=500, eta_s=1000 - step)
            stage = Stage.CALIBRATING
            self.store.update(
                self.id, lambda job, p=progress, s=stage: job.model_copy(update={"progress": p, "stage": s})
            )

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self.over.set()
        self.thread.join()
        self.store.update(self.id, lambda job: transition(job, JobState.SUCCEEDED))


class Traffic:
    """What the page has received: bytes on the wire, and the status of each answer to a list's poll."""

    def __init__(self, page: Page) -> None:
        self.session: CDPSession = page.context.new_cdp_session(page)
        self.session.send("Network.enable")
        self.bytes = 0
        self.count = 0
        self.status: dict[str, int] = {}
        self.polls: list[tuple[int, int]] = []  # status, bytes
        self.session.on("Network.responseReceived", self.note_answer)
        self.session.on("Network.loadingFinished", self.note_end)

    def note_answer(self, event: dict[str, Any]) -> None:
        answer = event["response"]
        if "/v1/jobs?" not in answer["url"]:
            return
        if answer["status"] == 304:  # its end is not told: there is no body to read
            size = int(answer["encodedDataLength"])
            self.bytes += size
            self.polls.append((304, size))
        else:
            self.status[event["requestId"]] = answer["status"]

    def note_end(self, event: dict[str, Any]) -> None:
        size = int(event["encodedDataLength"])
        self.bytes += size
        self.count += 1
        if event["requestId"] in self.status:
            self.polls.append((self.status[event["requestId"]], size))


def login_link(url: str) -> str:
    answer = httpx.post(f"{url}/v1/login-links", headers={"Authorization": f"Bearer {KEY}"})
    return url + str(answer.raise_for_status().json()["path"])


def signed_in(browser: Browser, url: str) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.goto(login_link(url))
    page.locator(".row").first.wait_for()
    return page


def measure_loads(browser: Browser, url: str) -> None:
    first, largest, weights = [], [], []
    for _ in range(LOADS):
        page = signed_in(browser, url)
        traffic = Traffic(page)
        traffic.session.send("Network.clearBrowserCache")  # all of it comes over the wire
        page.goto("about:blank")
        traffic.bytes = 0
        page.goto(f"{url}/#/jobs")
        page.locator(".row").first.wait_for()
        paints = page.evaluate(PAINTS)
        first.append(paints["first"])
        largest.append(paints["largest"])
        weights.append(traffic.bytes)
        page.context.close()
    for name, values in (("first contentful paint", first), ("largest contentful paint", largest)):
        print(f"{name}, empty cache: median {statistics.median(values):.0f} ms, slowest {max(values):.0f} ms")
    print(f"page weight with the first list: {max(weights) / 1000:.1f} kB")


def measure_scrolling(page: Page, count: int) -> None:
    """The list is read whole by scrolling, then scrolled from start to end, a step in every frame."""
    started = time.perf_counter()
    while page.locator(".row").count() < count:
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        page.wait_for_timeout(20)
    print(f"{count} jobs read by scrolling in {time.perf_counter() - started:.1f} s")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    before = busy_seconds(session)
    frames = sorted(page.evaluate(SCROLL, SCROLL_STEP))
    busy = busy_seconds(session) - before
    dropped = sum(round(frame / FRAME_MS) - 1 for frame in frames if frame > 1.5 * FRAME_MS)
    share = dropped / (len(frames) + dropped)
    print(
        f"scrolling: {len(frames)} frames, p50 {frames[len(frames) // 2]:.1f} ms, "
        f"p99 {frames[int(0.99 * len(frames))]:.1f} ms, longest {frames[-1]:.1f} ms, "
        f"dropped {dropped} ({share:.1%}); main thread {1000 * busy / len(frames):.2f} ms of CPU a frame"
    )


def busy_seconds(session: CDPSession) -> float:
    """CPU seconds of the page's main thread in tasks."""
    found = session.send("Performance.getMetrics")["metrics"]
    return float(next(each["value"] for each in found if each["name"] == "TaskDuration"))


def measure_polls(page: Page, seconds: float, name: str) -> None:
    page.evaluate("scrollTo(0, 0)")
    traffic = Traffic(page)
    page.wait_for_timeout(1000 * seconds)
    unchanged = [size for status, size in traffic.polls if status == 304]
    changed = [size for status, size in traffic.polls if status != 304]
    print(
        f"polls in {seconds:.0f} s, {name}: {len(traffic.polls)}, of them 304: {len(unchanged)} of at most "
        f"{max(unchanged, default=0)} bytes; others of at most {max(changed, default=0)} bytes; "
        f"everything received {traffic.bytes / 1000:.1f} kB"
    )


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--jobs", type=int, default=1000)
    reader.add_argument("--seconds", type=float, default=60)
    given = reader.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_api(Path(folder)) as (url, store),
        sync_playwright() as player,
    ):
        fill(store, given.jobs - 1)
        with Running(store, every_s=5) as running:
            print(f"{given.jobs} jobs, one of them running; load {os.getloadavg()[0]:.1f}")
            browser = player.chromium.launch(executable_path=chromium, args=FLAGS)
            measure_loads(browser, url)
            page = signed_in(browser, url)
            measure_scrolling(page, given.jobs)
            measure_polls(page, given.seconds, "a job reports every 5 s")
            assert running.thread.is_alive()
        page.wait_for_timeout(15_000)  # until the page has seen the job's end, and asks less often
        measure_polls(page, given.seconds, "nothing changes")
        browser.close()


if __name__ == "__main__":
    main()
