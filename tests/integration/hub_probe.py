"""Reads a hub model in a process of its own: the hub's client reads HF_ENDPOINT once, when it is imported."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from app.core.errors import NibbleError
from app.core.jobs.submission import check_submission
from app.core.records.specs import JobSpec
from app.core.settings import Settings
from app.core.sources.fetching import ModelCache
from app.core.sources.model_source import inspect_model, open_model
from app.core.sources.text_source import open_text


def nothing(_: int) -> None:
    return None


def look(action: str, reference: str, folder: Path) -> dict[str, object]:
    if action == "inspect":
        files = open_model(reference, model_roots=())
        headers = inspect_model(files)
        return {"name": files.name, "tensors": sorted(headers.tensors), "files": headers.files}
    if action == "fetch":
        model = ModelCache(folder, Settings()).fetch(reference, nothing)
        files = sorted(path for path in model.folder.rglob("*") if path.is_file())
        contents = {path.relative_to(model.folder).as_posix(): path.read_bytes() for path in files}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        return {"name": model.name, "digest": model.digest, "files": digests, "notes": model.notes}
    if action == "submit":
        model, adapter = reference.split()
        spec = check_submission(JobSpec(model=model, adapter=adapter), Settings()).spec
        return {"model": spec.model, "adapter": spec.adapter}
    text = open_text(reference, model_roots=())
    return {"text": text.files.read(text.path, 0, text.size).decode()}


if __name__ == "__main__":
    try:
        answer = look(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except NibbleError as error:
        answer = {"code": error.code, "message": error.message, "remedy": error.remedy, "param": error.param}
    sys.stdout.write(json.dumps(answer))
