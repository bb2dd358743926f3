"""The API's processor time per job beside few kept jobs and beside many, by turns in one run.

python -m tests.benchmarks.fleet_api [--kept 2000 20000] [--rounds 6] [--jobs 100]

Each service is an API process, a Redis and a folder of its own. A job is a submission, a page of each list
that dashboards poll, its own record, and its end (`cancel`): what callers do, without workers. Rounds take
turns, so that what else runs on the machine meets all alike; the first round of each is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx
from redis import Redis

from app.core.redis.redis_server import connect, resolve_redis
from app.core.settings import Settings
from tests.benchmarks.fleet import MODEL, RECIPE, TENANTS, Apis, tenant_keys
from tests.benchmarks.fleet_clients import PAGES
from tests.benchmarks.fleet_kept import fill


class Api:
    """One API process beside so many kept jobs."""

    def __init__(self, stack: ExitStack, kept: int) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(resolve_redis(Settings(state_dir=folder / "redis")))
        redis: Redis = stack.enter_context(connect(server.url, timeout_s=60))
        keys = tenant_keys(redis)
        fill(redis, folder, list(keys), kept)
        self._process = Apis(folder, server.url, 1)
        stack.callback(self._process.stop)
        self._clients = [
            stack.enter_context(
                httpx.Client(
                    base_url=f"http://127.0.0.1:{self._process.ports[0]}",
                    headers={"Authorization": f"Bearer {key}"},
                    trust_env=False,
                )
            )
            for key in keys.values()
        ]

    def round(self, jobs: int) -> float:
        """Processor seconds of each of so many jobs."""
        before = self._process.cpu_s
        for number in range(jobs):
            self._job(self._clients[number % TENANTS])
        return (self._process.cpu_s - before) / jobs

    def _job(self, client: httpx.Client) -> None:
        body = {"model": MODEL, "force": True, "formats": ["awq"], "recipe": RECIPE}
        job = client.post("/v1/jobs", json=body).raise_for_status().json()
        for path in (*PAGES.values(), f"/v1/jobs/{job['id']}"):
            client.get(path).raise_for_status()
        client.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kept", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=100, help="of a round")
    options = parser.parse_args()
    with ExitStack() as stack:
        apis = {kept: Api(stack, kept) for kept in options.kept}
        for api in apis.values():
            api.round(options.jobs)
        rounds = [
            {kept: api.round(options.jobs) for kept, api in apis.items()} for _ in range(options.rounds)
        ]
    fewest = options.kept[0]
    for kept in options.kept:
        milliseconds = sorted(each[kept] * 1e3 for each in rounds)
        ratios = sorted(each[kept] / each[fewest] for each in rounds)
        print(
            f"{kept:7} kept: {statistics.median(milliseconds):.2f} ms a job "
            f"({milliseconds[0]:.2f} to {milliseconds[-1]:.2f}), {statistics.median(ratios):.3f} of those at "
            f"{fewest} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
