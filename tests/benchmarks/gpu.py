"""All that a machine with a GPU is asked, in one run of under eight minutes: `make gpu`.

    python tests/benchmarks/gpu.py [--out FOLDER] [--wheels FOLDER] [--only PART ...]
    python tests/benchmarks/gpu.py --device cpu --tiny          the same with tiny sizes, to try it anywhere

Nothing is installed. What the machine's Python lacks may lie as wheels in a folder (`make gpu-wheels` fills
one for Python 3.12): they are unpacked into a temporary folder for this run, with the project's own metadata.
Each part is a process with a limit of its own, so that a part that fails or hangs costs no other its figures.
`gpu.json` is written anew after each part, `gpu.md` at the end: tables for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS_SCRIPT = Path(__file__).with_name("gpu_parts.py")
# Seconds of each; together under eight minutes. `tests` and `model` run side by side, as neither is timed.
LIMITS = {"facts": 25, "tests": 110, "model": 100, "job": 85, "serving": 110, "peer": 60, "kernels": 80}
ORDER = (("facts",), ("tests", "model"), ("job",), ("serving",), ("peer",), ("kernels",))
LOG_LINES = 40


def unpacked(wheels: Path, target: Path) -> Path:
    """A folder for PYTHONPATH with the wheels' packages and metadata of this project."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    about = target / f"{project['name']}-{project['version']}.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", "utf-8"
    )
    return target


class Run:
    """The processes of a run, and what they found."""

    def __init__(self, options: argparse.Namespace, work: Path, paths: list[Path]) -> None:
        self.options, self.work, self.out = options, work, Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        former = os.environ.get("PYTHONPATH", "")
        joined = os.pathsep.join([*map(str, paths), *([former] if former else [])])
        self.environment = {**os.environ, "PYTHONPATH": joined, "HF_HUB_OFFLINE": "1"}
        self.results: dict[str, Any] = {}

    def start(self, part: str) -> tuple[str, subprocess.Popen[bytes], float]:
        command = [
            sys.executable, str(PARTS_SCRIPT), part, "--device", self.options.device,
            "--work", str(self.work), "--json", str(self.out / f"{part}.json"),
            *(["--tiny"] if self.options.tiny else []),
        ]  # fmt: skip
        with (self.out / f"{part}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        return part, process, time.monotonic()

    def finish(self, part: str, process: subprocess.Popen[bytes], started: float) -> None:
        """Wait until its limit; then note its figures, or the end of its log."""
        try:
            code: int | str = process.wait(max(LIMITS[part] - (time.monotonic() - started), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: it and what it started
            process.wait()
            code = f"over its limit of {LIMITS[part]} s"
        figures = self.out / f"{part}.json"
        self.results[part] = {
            "seconds": round(time.monotonic() - started, 1),
            "ended": "well" if code == 0 else code,
            "figures": json.loads(figures.read_text("utf-8")) if figures.exists() else None,
        }
        if code != 0:
            lines = (self.out / f"{part}.log").read_text("utf-8", "replace").splitlines()
            self.results[part]["log"] = lines[-LOG_LINES:]
        (self.out / "gpu.json").write_text(json.dumps(self.results, indent=1) + "\n", "utf-8")
        print(f"{part}: {self.results[part]['ended']}, {self.results[part]['seconds']} s", flush=True)

    def run(self, parts: list[str]) -> None:
        for together in ORDER:
            running = [self.start(part) for part in together if part in parts]
            for part, process, started in running:
                self.finish(part, process, started)
        (self.out / "gpu.md").write_text(tables(self.results), "utf-8")


def tables(results: dict[str, Any]) -> str:
    """What docs/benchmarks.md takes over, as far as there are figures."""

    def figures(part: str) -> dict[str, Any]:
        return (results.get(part) or {}).get("figures") or {}

    lines = [" · ".join(f"{key} {value}" for key, value in figures("facts").items()), ""]
    if figures("tests"):
        lines += [f"- {file}: {ended}" for file, ended in figures("tests").items()] + [""]
    if figures("job"):
        lines += ["| stage of the job | s |", "|---|---|"]
        lines += [f"| {stage} | {seconds:.1f} |" for stage, seconds in figures("job")["stages"].items()]
        lines += [f"| peak of the device, GB | {(figures('job')['peak_vram_bytes'] or 0) / 1e9:.1f} |", ""]
    if figures("serving"):
        lines += ["| serving | figures |", "|---|---|"]
        lines += [f"| {name} | {compact(value)} |" for name, value in figures("serving").items()]
        lines += [
            f"| transformers' batching, {name} | {compact(value)} |"
            for name, value in figures("peer").items()
        ]
        lines.append("")
    rows = figures("kernels").get("rows") or []
    if rows:
        lines += ["| kernel | us | of the floor | dense over it |", "|---|---|---|---|"]
        lines += ["| {name} | {median_us:.2f} | {fraction:.2f} | {ratio:.2f} |".format(**row) for row in rows]
        lines.append("")
    faults = [f"- {part}: {result['ended']}" for part, result in results.items() if result["ended"] != "well"]
    return "\n".join([*lines, *(["Not measured:", *faults] if faults else [])]) + "\n"


def compact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {compact(each)}" for key, each in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> int:
    """0 if every part ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in a minute")
    parser.add_argument("--out", default=os.environ.get("OUT") or "gpu-figures")
    parser.add_argument("--wheels", default=os.environ.get("WHEELS"), help="a folder of wheels to run with")
    parser.add_argument("--only", nargs="+", choices=tuple(LIMITS), default=list(LIMITS))
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="nibble-gpu-"))
    try:
        paths = [REPOSITORY]
        if options.wheels:
            paths.append(unpacked(Path(options.wheels), work / "packages"))
        run = Run(options, work, paths)
        run.run(options.only)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print((run.out / "gpu.md").read_text("utf-8"))
    return 0 if all(result["ended"] == "well" for result in run.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
