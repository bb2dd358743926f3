"""`make quick`: lint, types, import rules and the unit tests of what changed, in under a minute of CPU.

What changed is what differs from the last commit that is also in `main`, committed or not. A module is judged
by the unit tests that are named after it and those that import it, or else by those of its folder. The
rest is for `make unit` and `make test`.
"""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).parents[1]
UNIT = "tests/unit"
PACKAGES = ("app/", "workers/", "kernels/")
MOST_IMPORTERS = 5  # of a module that more tests import, the one that mirrors it
BIN = Path(sys.executable).parent


def git(*command: str) -> list[str]:
    ran = subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def changed_files(branch: str = "main") -> list[str]:
    """Files that differ from where the work left `branch`, with new and deleted ones."""
    try:
        (base,) = git("merge-base", "HEAD", branch)
    except subprocess.CalledProcessError:  # a clone without that branch
        base = "HEAD"
    edited = git("diff", "--name-only", "--no-renames", base)
    return sorted({*edited, *git("ls-files", "--others", "--exclude-standard")})


def named_after(path: PurePosixPath, repository: Path) -> set[str]:
    """The unit tests in the place of a module or folder, `*` being any module."""
    folder = repository / UNIT / path.parent
    tests = (*folder.glob(f"test_{path.name}.py"), *folder.glob(f"test_{path.name}_*.py"))
    return {test.relative_to(repository).as_posix() for test in tests}


def imported(source: str) -> set[str]:
    """The modules that a file imports, and whatever is imported from them, by dotted name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def judges(changed: Iterable[str], repository: Path) -> list[str]:
    """The unit tests that judge these files, sorted."""
    sources = [path for path in changed if path.endswith(".py")]
    imports = {
        test.relative_to(repository).as_posix(): imported(test.read_text())
        for test in (repository / UNIT).rglob("test_*.py")
    }
    chosen = imports.keys() & set(sources)
    for path in sources:
        importers = {test for test, modules in imports.items() if module_of(path) in modules}
        module = PurePosixPath(path).with_suffix("")
        tests = named_after(module, repository) | (importers if len(importers) <= MOST_IMPORTERS else set())
        if path.startswith(PACKAGES) and not tests:
            tests = named_after(module.parent / "*", repository) or named_after(module.parent, repository)
        chosen |= tests
    return sorted(chosen)


def commands(changed: list[str]) -> Iterator[list[str]]:
    sources = [path for path in changed if path.endswith(".py")]
    if not sources:
        return
    present = [path for path in sources if (REPOSITORY / path).exists()]
    yield ["ruff", "check", *present]
    yield ["ruff", "format", "--check", *present]
    if any(path.startswith(PACKAGES) for path in sources):
        yield ["mypy"]
        yield ["lint-imports"]
    tests = judges(changed, REPOSITORY)
    if tests:
        yield ["pytest", "-q", *tests]


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    changed = changed_files()
    print(f"{len(changed)} files differ from main")  # noqa: T201
    failed = []
    for program, *arguments in commands(changed):
        print(f"\n{program} {' '.join(arguments)}", flush=True)  # noqa: T201
        if subprocess.run([BIN / program, *arguments], cwd=REPOSITORY, check=False).returncode != 0:
            failed.append(program)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{used.ru_utime + used.ru_stime:.0f} s of CPU; {', '.join(failed) or 'nothing'} failed")  # noqa: T201
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
