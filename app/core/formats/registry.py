"""The file formats by name. A further one is a line in each of the two lists here."""

from __future__ import annotations

from typing import Literal

from app.core.formats.awq import AwqFormat
from app.core.formats.compressed_tensors import CompressedTensorsFormat
from app.core.formats.file_format import FileFormat
from app.core.formats.gguf import GgufFormat
from app.core.formats.gptq import GptqFormat

FormatName = Literal["awq", "compressed-tensors", "gguf", "gptq"]
FORMATS: dict[FormatName, FileFormat] = {
    "awq": AwqFormat(),
    "compressed-tensors": CompressedTensorsFormat(),
    "gguf": GgufFormat(),
    "gptq": GptqFormat(),
}
