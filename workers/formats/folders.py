"""Which folder a format is written by: safetensors beside the model's other files, or one file for all."""

from __future__ import annotations

from app.core.formats.registry import FORMATS, FormatName
from workers.formats.folder import FormatFolder
from workers.formats.gguf_folder import GgufFolder


def folder_class(name: FormatName) -> type[FormatFolder]:
    return FormatFolder if FORMATS[name].single_file is None else GgufFolder
