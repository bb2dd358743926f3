"""Takes each guard away, one at a time, and demands that its test fails: `make guards`.

    python -m tests.attacks.prove [--lanes N] [--only WORDS]

Every lane works on a copy of the tree. First its tests run on the code as it is, and must pass.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.attacks.guards import GUARDS, Guard

REPOSITORY = Path(__file__).parents[2]
PARTS = (
    *("app", "workers", "kernels", "tests", "examples", "docs", "docker"),
    *("pyproject.toml", "README.md", ".env.example"),
)
LIMIT_S = 300
PRELOADED = ("pytest", "fastapi", "httpx", "obstore", "redis", "rq", "torch", "transformers")
BROKEN = 70
FAILED = 1  # of pytest: tests ran, and some failed; other codes mean that none ran


def copy_of_the_tree(folder: Path) -> Path:
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return folder


def preload() -> None:
    """Import what most tests need, once; each test then runs in a fork. Nothing of ours is loaded."""
    for name in PRELOADED:
        importlib.import_module(name)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and its output, from a fork that takes our modules from `tree`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        pid = os.fork()
        if pid == 0:
            with output.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os._exit(in_tree(tree, ["--basetemp", f"{folder}/t", *tests]))
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), output.read_text(errors="replace").strip()


def in_tree(tree: Path, arguments: Sequence[str]) -> int:
    os.chdir(tree)
    sys.path[0] = str(tree)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", str(LIMIT_S)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was preloaded
    try:
        return int(importlib.import_module("pytest").main([*options, *arguments]))
    except BaseException:  # noqa: BLE001  # this fork must not go on as its parent
        traceback.print_exc()
        return BROKEN
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def miss(tree: Path, guard: Guard) -> str:
    """What is wrong with the run of the guard's test without the guard; empty if it failed, as it must."""
    path = tree / guard.file
    whole = path.read_text()
    if whole.count(guard.before) != 1:
        return "the guard is not where the table says"
    path.write_text(whole.replace(guard.before, guard.after))
    try:
        code, output = run_tests(tree, [guard.test])
    finally:
        path.write_text(whole)
    last = output.splitlines()[-1] if output else "silence"
    return "" if code == FAILED and " error" not in last else f"pytest ended with {code}: {last}"


def lane(number: int, guards: Sequence[Guard]) -> list[str]:
    """Prove some of the guards, in a process and a tree of their own."""
    found = []
    with tempfile.TemporaryDirectory(prefix=f"guards-{number}-") as folder:
        tree = copy_of_the_tree(Path(folder))
        code, output = run_tests(tree, sorted({guard.test for guard in guards}))
        if code != 0:
            return [f"tests fail with all guards in place:\n{output}"]
        for guard in guards:
            why = miss(tree, guard)
            print("NOT PROVEN:" if why else "proven:", guard.attack, why, flush=True)  # noqa: T201
            found += [f"{guard.attack}: {why}"] if why else []
    return found


def prove(guards: Sequence[Guard], lanes: int) -> list[str]:
    """What is not proven; empty if all is."""
    # No bytecode: a file that is changed and put back within a second looks unchanged to its cache.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with ProcessPoolExecutor(
        lanes, mp_context=multiprocessing.get_context("fork"), initializer=preload
    ) as pool:
        shares = [guards[number::lanes] for number in range(lanes)]
        return [line for lines in pool.map(lane, range(lanes), shares) for line in lines]


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
