"""Takes each guard away, one at a time, and demands that its test fails: `make guards`.

    python -m tests.attacks.prove [--lanes N] [--only WORDS]

Every lane works on a copy of the tree. First all tests run on the code as it is, and must pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.attacks.guards import GUARDS, Guard

REPOSITORY = Path(__file__).parents[2]
PARTS = (
    *("app", "workers", "kernels", "tests", "examples", "docs", "docker"),
    *("pyproject.toml", "README.md", ".env.example"),
)
LIMIT_S = 300
FAILED = 1  # of pytest: tests ran, and some failed; other codes mean that none ran


def copy_of_the_tree(folder: Path) -> Path:
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return folder


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and its output."""
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", str(LIMIT_S))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-B", "-m", "pytest", *options, "--basetemp", f"{folder}/t", *tests],
            cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def miss(tree: Path, guard: Guard) -> str:
    """What came of running the guard's test without the guard."""
    path = tree / guard.file
    whole = path.read_text()
    if whole.count(guard.before) != 1:
        return "the guard is not where the table says"
    path.write_text(whole.replace(guard.before, guard.after))
    try:
        code, output = run_tests(tree, [guard.test])
    finally:
        path.write_text(whole)
    if code == FAILED and " skipped" not in output.splitlines()[-1]:
        return ""
    return f"pytest ended with {code}: {output.splitlines()[-1] if output else 'silently'}"


def prove(guards: Sequence[Guard], lanes: int) -> list[str]:
    """What is not proven; empty if all is."""
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for lane in range(lanes):
            (Path(folder) / str(lane)).mkdir()
            trees.put(copy_of_the_tree(Path(folder) / str(lane)))
        tree = trees.get()
        code, output = run_tests(tree, sorted({guard.test for guard in guards}))
        trees.put(tree)
        if code != 0:
            return [f"the tests fail with all guards in place:\n{output}"]

        def work(guard: Guard) -> str:
            own = trees.get()
            try:
                found = miss(own, guard)
            finally:
                trees.put(own)
            print(f"{'proven' if not found else 'NOT PROVEN'}: {guard.attack}", found, flush=True)  # noqa: T201
            return f"{guard.attack}: {found}" if found else ""

        with ThreadPoolExecutor(lanes) as pool:
            return list(filter(None, pool.map(work, guards)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--only", default="", help="guards whose attack, file or test holds these words")
    options = parser.parse_args()
    chosen = [guard for guard in GUARDS if options.only in f"{guard.attack} {guard.file} {guard.test}"]
    missing = prove(chosen, options.lanes)
    print(f"{len(chosen) - len(missing)} of {len(chosen)} guards are proven", *missing, sep="\n")  # noqa: T201
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
