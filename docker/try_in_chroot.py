#!/usr/bin/env python3
"""Runs an image's build steps and entry point in a bare Debian tree, where no container engine is at hand.

    sudo python3 docker/try_in_chroot.py docker/api.Dockerfile api --redis redis://127.0.0.1:6379/0

Needs root, debootstrap and a Redis. Debian with its own Python stands in for the base image. `--pass NAME`
hands a variable of the caller's environment (such as pip's) to the build steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SUITE = "bookworm"
PYTHON = "/opt/python"  # a virtual environment in the tree: what `python` and `pip` mean in the base image
PACKAGES = "python3,python3-venv,ca-certificates"


@dataclass
class Tree:
    """A root folder and the state that a Dockerfile's instructions change."""

    root: Path
    environment: dict[str, str]
    folder: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)

    def inside(self, path: str) -> Path:
        absolute = path if path.startswith("/") else f"{self.folder}/{path}"
        return self.root / absolute.lstrip("/")

    def run(self, command: list[str], **more: str) -> None:
        """Run a command in the tree, as its user. Raises CalledProcessError."""
        words = " ".join(map(shlex.quote, command))
        subprocess.run(
            ["chroot", f"--userspec={self.user}:{self.user}", self.root, "/bin/sh", "-c",
             f"cd {shlex.quote(self.folder)} && exec {words}"],
            env={**self.environment, **more}, check=True,
        )  # fmt: skip


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Pairs of keyword and the rest, comments gone and continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            yield keyword.upper(), rest.strip()


def apply(tree: Tree, keyword: str, rest: str, arguments: dict[str, str]) -> None:
    """One instruction. Those that only describe an image change nothing here."""
    if keyword == "ARG":
        name, _, default = rest.partition("=")
        tree.environment[name] = arguments.get(name, default)
    elif keyword == "ENV":
        tree.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
    elif keyword == "WORKDIR":
        tree.folder = rest
        tree.inside(rest).mkdir(parents=True, exist_ok=True)
    elif keyword == "COPY":
        copy(tree, rest.split())
    elif keyword == "RUN":
        print(f"--- RUN {rest[:100]}", flush=True)
        tree.run(["/bin/sh", "-c", rest])
    elif keyword == "USER":
        tree.user = rest
    elif keyword == "ENTRYPOINT":
        tree.entrypoint = json.loads(rest)
    elif keyword not in ("FROM", "CMD", "EXPOSE", "VOLUME", "HEALTHCHECK"):
        sys.exit(f"this script does not know the instruction {keyword}")


def copy(tree: Tree, paths: list[str]) -> None:
    *sources, target = paths
    for source in sources:
        origin, place = REPOSITORY / source, tree.inside(target)
        if origin.is_dir():
            shutil.copytree(origin, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place = place / origin.name if target.endswith("/") else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, place)


@contextmanager
def mounted(source: str, place: Path) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--rbind", source, place], check=True)
    subprocess.run(["mount", "--make-rslave", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", place], check=True)


def build(options: argparse.Namespace, root: Path, stack: ExitStack) -> Tree:
    """The tree after all build steps."""
    root.chmod(0o755)  # others than root shall run in it
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root], check=True)
    shutil.copy2("/etc/resolv.conf", root / "etc/resolv.conf")
    for folder in ("/proc", "/dev", *options.mount):
        stack.enter_context(mounted(folder, root / folder.lstrip("/")))
    passed = {name: os.environ[name] for name in options.pass_ if name in os.environ}
    tree = Tree(
        root,
        {"PATH": f"{PYTHON}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", **passed},
    )
    tree.run(["python3", "-m", "venv", PYTHON])
    arguments = dict(pair.split("=", 1) for pair in options.build_arg)
    for keyword, rest in instructions(options.dockerfile):
        apply(tree, keyword, rest, arguments)
    return tree


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--redis", required=True, help="the URL of a Redis for the entry point")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--pass", dest="pass_", action="append", default=[], metavar="NAME")
    parser.add_argument("--mount", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--check", help="a shell line for this host that must succeed while the process runs")
    parser.add_argument("command", nargs="*", help="the arguments of the entry point")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="nibble-tree-") as folder, ExitStack() as stack:
        tree = build(options, Path(folder), stack)
        secrets = tree.inside("/run/secrets")
        secrets.mkdir(parents=True)
        (secrets / "NIBBLE_REDIS_URL").write_text(options.redis)
        words = [*tree.entrypoint, *options.command]
        print(f"--- ENTRYPOINT {' '.join(words)}", flush=True)
        process = subprocess.Popen(
            ["chroot", f"--userspec={tree.user}:{tree.user}", tree.root, "/usr/bin/env", *words],
            env={**tree.environment, "HOME": "/home/nibble"},
        )
        try:
            if options.check:
                subprocess.run(
                    ["/bin/sh", "-c", options.check], check=True, env={**os.environ, "TREE": folder}
                )
            if process.poll() is not None:
                sys.exit(f"the entry point ended with {process.returncode}")
        finally:
            process.terminate()
            process.wait(60)
    print("--- done: build steps and entry point work")


if __name__ == "__main__":
    main()
