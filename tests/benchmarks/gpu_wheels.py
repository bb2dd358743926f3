"""Downloads the wheels that a GPU machine lacks for gpu.py: `python tests/benchmarks/gpu_wheels.py FOLDER`.

All that the worker's part of this project and its tests on a GPU need, at the versions installed here, for
Python 3.12 on x86-64 Linux; without PyTorch and what comes with it. `--list` names them;
`--with scipy` takes that in, 35 MB more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
ROOTS = (
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["worker"],
    "pytest-timeout",
    "hypothesis",
)
GLIBC = (39, 35, 34, 31, 28, 27, 17, 12, 5)  # versions that wheels are built for; the machine has 2.39
# They are there, large, or nothing that a run on a GPU imports.
LEFT_OUT = {
    "torch", "triton", "numpy", "scipy", "networkx", "sympy", "setuptools", "hf-xet", "pytest", "tqdm",
}  # fmt: skip
PYTHON = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}


def closure(roots: tuple[str, ...]) -> dict[str, str]:
    """Names and versions of everything that the roots need, but for what is left out."""
    found: dict[str, str] = {}
    waiting = [Requirement(root) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        key = name, frozenset(requirement.extras)
        if name in LEFT_OUT or key in seen:
            continue
        seen.add(key)
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # of another platform or Python
            continue
        for text in requires(name) or ():
            inner = Requirement(text)
            extras = [*requirement.extras, ""]
            if inner.marker is None or any(inner.marker.evaluate({**PYTHON, "extra": e}) for e in extras):
                waiting.append(inner)
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-wheels"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--with", dest="also", nargs="*", default=[], help="of what is left out: scipy, tqdm")
    options = parser.parse_args()
    LEFT_OUT.difference_update(options.also)
    pinned = [f"{name}=={number}" for name, number in closure(ROOTS).items()]
    if options.list:
        print("\n".join(pinned))
        return
    command = [
        sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps",
        "--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp",
        *(word for tag in GLIBC for word in ("--platform", f"manylinux_2_{tag}_x86_64")),
        "--platform", "manylinux2014_x86_64", "--dest", str(options.folder), *pinned,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    taken = sum(wheel.stat().st_size for wheel in options.folder.glob("*.whl"))
    print(f"{len(pinned)} wheels, {taken / 1e6:.0f} MB in {options.folder}")


if __name__ == "__main__":
    main()
