"""Downloads a job's model and texts to this host, once, and computes their digests.

A model in a local folder is read in place. Of others the files that make up the model are downloaded into
the cache of the state folder, under a key that names their content; workers of one host share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from app.core.records.specs import Frozen, JobSpec, Kept, TextSpec
from app.core.settings import Settings
from app.core.sources.adapter_model import adapter_files, inspect_merged
from app.core.sources.file_digest import file_sha256
from app.core.sources.model_headers import merged_digest
from app.core.sources.model_source import LocalModel, ModelFiles, model_digest, open_adapter, open_model
from app.core.sources.text_source import is_remote
from app.core.sources.uploaded_text import open_job_text
from app.core.storage.cached_folders import CachedFolders
from app.core.storage.reuse import text_key

OnBytes = Callable[[int], None]  # gets the bytes of each read, and may raise to stop


class FetchedModel(Frozen):
    """A model on this host. `name` is a reference that means the same content wherever it can."""

    folder: Path
    name: str
    digest: str
    notes: tuple[str, ...]
    adapter: FetchedAdapter | None = None
    is_gguf: bool = False

    @property
    def merged_digest(self) -> str:
        """The identity of the weights that the job starts from."""
        return merged_digest(self.digest, None if self.adapter is None else self.adapter.digest)

    def assigned(self) -> dict[str, Any]:
        """The fields of a child's assignment."""
        fields: dict[str, Any] = {
            f"model_{name}": getattr(self, name) for name in ("folder", "name", "digest", "notes")
        }
        return fields | {f"adapter_{name}": value for name, value in self.adapter or ()}


class FetchedAdapter(Frozen):
    """The adapter that is merged into a model, on this host."""

    folder: Path
    name: str
    digest: str


class Digests(Kept):
    """SHA-256 of each file of a model, kept beside it."""

    sha256: dict[str, str]


class ModelCache:
    """Models below a folder that all workers of a host share."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folders = CachedFolders(folder, settings.model_cache_bytes)
        self._uses = ExitStack()  # of models that may not be removed until this cache is left
        self._settings = settings

    def fetch(self, reference: str, on_bytes: OnBytes, adapter: str | None = None) -> FetchedModel:
        """The model's folder and digest, and those of the adapter, downloaded if need be.

        Raises ModelRefused if files are unsafe: they may have changed since the job was accepted.
        """
        files = open_model(reference, **self._settings.source_access)
        opened = None if adapter is None else open_adapter(adapter, **self._settings.source_access)
        headers = inspect_merged(files, opened)
        folder, digest = self._folder(files, headers.files, on_bytes)
        merged = None
        if opened is not None:
            own_folder, own_digest = self._folder(opened, adapter_files(opened), on_bytes)
            merged = FetchedAdapter(folder=own_folder, name=opened.name, digest=own_digest)
        return FetchedModel(
            folder=folder,
            name=files.name,
            digest=digest,
            notes=headers.notes,
            adapter=merged,
            is_gguf=headers.gguf is not None,
        )

    def _folder(self, files: ModelFiles, sizes: dict[str, int], on_bytes: OnBytes) -> tuple[Path, str]:
        """The folder on this host that holds the chosen files, and their digest."""
        key = choice_key(files.content_key(), sizes)
        with self._folders.locked(key, lambda: on_bytes(0)):
            if isinstance(files, LocalModel):
                folder = files.folder
            else:
                self._uses.enter_context(self._folders.in_use(key))
                folder = self._folders.fill(
                    key, sizes, lambda path, dest: files.download(path, dest, on_bytes)
                )
            digests = self._digests(key, folder, sizes, on_bytes)
        return folder, model_digest(digests)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self._uses.close()

    def _digests(self, key: str, folder: Path, sizes: Mapping[str, int], on_bytes: OnBytes) -> dict[str, str]:
        """SHA-256 by file; hashing a large model takes minutes, so the result is kept by content key."""
        record = self._folders.root / f"{key}.json"
        if record.exists():
            try:
                return Digests.model_validate_json(record.read_bytes()).sha256
            except ValidationError:
                record.unlink()
        sha256 = {path: file_sha256(folder / path, lambda: on_bytes(0)) for path in sorted(sizes)}
        unfinished = record.with_suffix(".part")
        unfinished.write_text(Digests(sha256=sha256).model_dump_json())
        unfinished.replace(record)
        return sha256


def choice_key(content_key: str, paths: Iterable[str]) -> str:
    """The cache key of a model: its content and the chosen files, as another version may choose others."""
    return hashlib.sha256("\n".join([content_key, *sorted(paths)]).encode()).hexdigest()


def fetch_text(
    spec: TextSpec, settings: Settings, dest: Path, on_bytes: OnBytes, *, in_place: bool = False
) -> Path | None:
    """The text file of a spec, copied to `dest` with its suffix; None if no file is needed.

    `in_place` leaves a file of this host where it is: it must not change before it is read.
    """
    if not is_remote(spec.source):
        return None
    text = open_job_text(spec.source, settings)
    if in_place and isinstance(text.files, LocalModel):
        return text.files.folder / text.path
    target = dest.with_name(dest.name + text.suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    text.files.download(text.path, target, on_bytes)
    return target


class FetchedTexts(Frozen):
    """A job's texts on this host. A text that needs no file has none."""

    calibration: Path | None
    evaluation: Path | None
    calibration_digest: str
    evaluation_digest: str | None  # None: not evaluated


def fetch_texts(
    spec: JobSpec, settings: Settings, folder: Path, on_bytes: OnBytes, *, in_place: bool = False
) -> FetchedTexts:
    calibration, evaluation = (
        None if text is None else fetch_text(text, settings, folder / name, on_bytes, in_place=in_place)
        for name, text in (("calibration", spec.calibration), ("evaluation", spec.evaluation))
    )
    return FetchedTexts(
        calibration=calibration,
        evaluation=evaluation,
        calibration_digest=text_digest(spec.calibration, calibration, on_bytes),
        evaluation_digest=spec.evaluation and text_digest(spec.evaluation, evaluation, on_bytes),
    )


def text_digest(spec: TextSpec, file: Path | None, on_bytes: OnBytes) -> str:
    """A digest of a spec's text: of its content, or of the name of a bundled set."""
    if file is not None:
        return file_sha256(file, lambda: on_bytes(0))
    return text_key(spec)
