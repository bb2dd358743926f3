"""The files of a model beside its weights, as every loader opens them: in UTF-8, and naming no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.core.formats.file_format import FileFormat
from app.core.sources.file_choice import CONFIG, TOKENIZER
from app.core.sources.json_file import as_utf8, parse_json
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.gguf_tensors import write_tokenizer

OF_THE_ORIGINAL = ("transformers_weights",)  # keys of config.json that name files which are not copied


def write_quantized_side_files(
    source: Checkpoint, folder: Path, file_format: FileFormat, entry: dict[str, Any]
) -> None:
    """The side files beside weights in a format, which `entry` of config.json describes."""
    config = {key: value for key, value in source.config.items() if key not in OF_THE_ORIGINAL}
    write_side_files(source, folder, {**config, "quantization_config": entry})
    if file_format.config_file is not None:
        (folder / file_format.config_file).write_bytes(to_json(entry))


def write_side_files(source: Checkpoint, folder: Path, config: dict[str, Any]) -> None:
    """Copy the tokenizer, templates and settings of `source` into `folder`, beside `config`.

    Raises ModelRefused for JSON that can't be read, and for a tokenizer in GGUF that can't be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(to_json(config))
    if source.gguf is not None and TOKENIZER not in source.side_files:
        write_tokenizer(source.gguf, folder)
    for path in source.side_files:
        if path == CONFIG:
            continue
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        content = (source.folder / path).read_bytes()
        if path.endswith(".json"):
            content = as_utf8(path, content)
        if path.endswith(CONFIG):  # the other files that can name code
            settings = parse_json(path, content)
            content = to_json(settings.value) if settings.code else content
        target.write_bytes(content)


def to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
