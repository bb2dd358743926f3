"""Brings a job's model and texts to this host, once, and names their content by digest.

A model in a local folder is read in place. Of others the files that make up the model are downloaded into
the cache of the state folder, under a key that names their content; workers of one host share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from pydantic import ValidationError

from app.core.records.specs import Frozen, JobSpec, Kept, TextSpec
from app.core.settings import Settings
from app.core.sources.file_digest import file_sha256
from app.core.sources.model_source import LocalModel, ModelFiles, inspect_model, model_digest, open_model
from app.core.sources.text_source import is_remote, open_text
from app.core.storage.reuse import text_key

IN_USE = ".use"
PARTIAL = ".partial"
OnBytes = Callable[[int], None]  # hears of every piece, and may raise to stop


class FetchedModel(Frozen):
    """A model on this host. `name` is a reference that means the same content wherever it can."""

    folder: Path
    name: str
    digest: str
    notes: tuple[str, ...]


class Digests(Kept):
    """SHA-256 of each file of a model, kept beside it."""

    sha256: dict[str, str]


class ModelCache:
    """Models below a folder that all workers of a host share."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder = folder
        self._uses: list[IO[str]] = []
        self._settings = settings

    def fetch(self, reference: str, on_bytes: OnBytes) -> FetchedModel:
        """The model's folder and digest, downloaded if need be.

        Raises ModelRefused if its files are unsafe: they may have changed since the job was accepted.
        """
        files = open_model(
            reference,
            model_roots=self._settings.model_roots,
            networks=self._settings.outgoing_networks,
        )
        headers = inspect_model(files)
        sizes, key = headers.files, choice_key(files.content_key(), headers.files)
        self._folder.mkdir(parents=True, exist_ok=True)
        with exclusive(self._folder / f"{key}.lock", on_bytes):
            if isinstance(files, LocalModel):
                folder = files.folder
            else:
                folder = self._folder / key
                self._hold(key)
                if not folder.exists():
                    make_room(self._folder, sum(sizes.values()), self._settings.model_cache_bytes)
                    download_model(files, sizes, folder, on_bytes)
            digests = self._digests(key, folder, sizes, on_bytes)
        digest = model_digest(digests)
        return FetchedModel(folder=folder, name=files.name, digest=digest, notes=headers.notes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        for use in self._uses:
            use.close()
        self._uses.clear()

    def _hold(self, key: str) -> None:
        """Keep the model from being evicted until this cache is left or the process ends."""
        use = (self._folder / f"{key}{IN_USE}").open("w")
        fcntl.flock(use, fcntl.LOCK_SH)
        self._uses.append(use)

    def _digests(self, key: str, folder: Path, sizes: Mapping[str, int], on_bytes: OnBytes) -> dict[str, str]:
        """SHA-256 by file; hashing a large model takes minutes, so the result is kept by content key."""
        kept = self._folder / f"{key}.json"
        if kept.exists():
            try:
                return Digests.model_validate_json(kept.read_bytes()).sha256
            except ValidationError:
                kept.unlink()
        sha256 = {path: file_sha256(folder / path, lambda: on_bytes(0)) for path in sorted(sizes)}
        part = kept.with_suffix(".part")
        part.write_text(Digests(sha256=sha256).model_dump_json())
        part.replace(kept)
        return sha256


def choice_key(content_key: str, paths: Iterable[str]) -> str:
    """Names the content and the files of it that count: another version may choose others."""
    return hashlib.sha256("\n".join([content_key, *sorted(paths)]).encode()).hexdigest()


def make_room(cache: Path, needed: int, most: int) -> list[str]:
    """Remove the models that were used least recently until `needed` more bytes fit into `most`; their keys.

    A model that a job uses stays, and what does not fit is downloaded all the same: the limit bounds what is
    kept, not what is worked on.
    """
    models = [path for path in cache.iterdir() if path.is_dir()]
    sizes = {path: folder_bytes(path) for path in models}
    removed: list[str] = []
    for path in sorted(models, key=last_use):
        if not most or sum(sizes.values()) + needed <= most:
            break
        if evict(path):
            del sizes[path]
            removed.append(path.name)
    return removed


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def last_use(path: Path) -> float:
    """When a job has last taken the model into use, which writes its lock file."""
    use = path.with_name(path.name.removesuffix(PARTIAL) + IN_USE)
    return use.stat().st_mtime if use.exists() else 0.0


def evict(path: Path) -> bool:
    """Remove a model unless somebody uses it."""
    with path.with_name(path.name.removesuffix(PARTIAL) + IN_USE).open("a") as use:
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        gone = path.with_name(path.name + ".evicted")
        path.rename(gone)  # at once: a half removed model must not be taken for one
        shutil.rmtree(gone, ignore_errors=True)
    return True


def download_model(files: ModelFiles, sizes: Mapping[str, int], folder: Path, on_bytes: OnBytes) -> None:
    """Copy a model's files to `folder`, which appears when all of them are there.

    Files that an earlier try finished are kept.
    """
    stage = folder.with_name(folder.name + PARTIAL)
    stage.mkdir(exist_ok=True)
    for path, size in sorted(sizes.items()):
        dest = stage / path
        dest.parent.mkdir(parents=True, exist_ok=True)
        if dest.exists() and dest.stat().st_size == size:
            continue
        part = dest.with_name(dest.name + ".part")
        files.download(path, part, on_bytes)
        part.replace(dest)
    stage.rename(folder)


def fetch_text(spec: TextSpec, settings: Settings, dest: Path, on_bytes: OnBytes) -> Path | None:
    """The text file of a spec, copied to `dest` with its suffix; None if no file is needed."""
    if not is_remote(spec.source):
        return None
    text = open_text(spec.source, model_roots=settings.model_roots, networks=settings.outgoing_networks)
    target = dest.with_name(dest.name + text.suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    text.files.download(text.path, target, on_bytes)
    return target


class FetchedTexts(Frozen):
    """A job's texts on this host. A text that needs no file has none."""

    calibration: Path | None
    evaluation: Path | None
    calibration_digest: str
    evaluation_digest: str


def fetch_texts(spec: JobSpec, settings: Settings, folder: Path, on_bytes: OnBytes) -> FetchedTexts:
    calibration = fetch_text(spec.calibration, settings, folder / "calibration", on_bytes)
    evaluation = fetch_text(spec.evaluation, settings, folder / "evaluation", on_bytes)
    return FetchedTexts(
        calibration=calibration,
        evaluation=evaluation,
        calibration_digest=text_digest(spec.calibration, calibration, on_bytes),
        evaluation_digest=text_digest(spec.evaluation, evaluation, on_bytes),
    )


def text_digest(spec: TextSpec, file: Path | None, on_bytes: OnBytes) -> str:
    """What identifies the text of a spec: its content, or the name of a bundled set."""
    if file is not None:
        return file_sha256(file, lambda: on_bytes(0))
    return text_key(spec)


@contextmanager
def exclusive(path: Path, on_wait: OnBytes) -> Iterator[None]:
    """Hold a lock file. The kernel frees it when this process ends, however it ends."""
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait(0)
                time.sleep(0.2)
            else:
                break
        yield
