"""Chooses the files of a model, once for plan, digest, download, engine and artifact.

Weights are the files of the index, else `model.safetensors`, else the safetensors files at the top, else the
one GGUF file there. Beside them count the files that loaders open by name. Everything else is left out:
copies of the weights in another layout, adapters, pickles, code, what other tools have written. Notes say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from app.core.records.specs import Frozen
from app.core.sources.json_file import ReadableFiles, read_json, refused

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
GGUF, SPLIT = ".gguf", re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.ASCII | re.IGNORECASE)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SIDE_FILES = re.compile(
    "|".join(
        (
            r"config\.json|generation_config\.json",
            r"tokenizer\.json|tokenizer\.[\w.-]+\.json|tokenizer_config\.json",  # between them: a version
            r"special_tokens_map\.json|added_tokens\.json",
            r"[\w.-]+\.model|tokenizer\.model\.[\w.-]+|[\w.-]+\.tiktoken|tekken\.json",
            r"vocab\.json|vocab\.txt|merges\.txt",
            r"chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja",
            r"(image_|video_)?(pre)?processor_config\.json",
        )
    ),
    re.ASCII,
)
# Safetensors files of another layout than transformers', and of what is added to a model.
FOREIGN = re.compile(r"consolidated[\w.-]*\.safetensors|adapter_model[\w.-]*\.safetensors", re.ASCII)
# Files that are never needed: hidden files, texts, pictures.
DOCUMENTS = re.compile(
    r"(.*/)?(\..*|[^./]+|[^/]+\.(md|txt|pdf|html|png|jpe?g|gif|svg|webp))", re.ASCII | re.IGNORECASE
)
MAX_INDEX_BYTES = 64 * 1024**2
MAX_SIDE_BYTES = 200 * 1024**2
MAX_SHARDS = 1024
NAMED = 5  # files that a note names


class FileChoice(Frozen):
    """The model's files and their sizes; `weights` are those with tensors, by the index if it counts."""

    weights: tuple[str, ...]
    index: dict[str, str] | None  # tensor -> file
    files: dict[str, int]
    notes: tuple[str, ...]

    @property
    def side_files(self) -> tuple[str, ...]:
        """All but the weights and their index."""
        return tuple(sorted(path for path in self.files if path != INDEX and path not in self.weights))


def gguf_file(name: str, sizes: Mapping[str, int]) -> str | None:
    """The GGUF file that is the model, None where there are weights in safetensors or no such file.

    Raises ModelRefused for several.
    """
    top = [path for path in sizes if "/" not in path]
    if any(path.endswith(".safetensors") or path == INDEX for path in top):
        return None
    candidates = sorted(path for path in top if path.lower().endswith(GGUF))
    if len(candidates) > 1:
        split = all(SPLIT.search(path) for path in candidates)
        raise refused(
            "gguf_several",
            f"{name} holds {'one model in ' if split else ''}{len(candidates)} GGUF files: "
            + ", ".join(candidates[:3])
            + (", …" if len(candidates) > 3 else ""),
            "merge them with llama.cpp's `llama-gguf-split --merge`" if split else "give a folder with one",
        )
    if candidates and SPLIT.search(candidates[0]):
        raise refused(
            "gguf_several",
            f"{name} holds {candidates[0]}, one of several files of a model",
            "merge all of them with llama.cpp's `llama-gguf-split --merge`",
        )
    return candidates[0] if candidates else None


def choose_gguf(files: ReadableFiles, path: str) -> FileChoice:
    """A GGUF file, which has its own config, and the tokenizer beside it: the file has one too, but a
    tokenizer.json is what the file's was made of."""
    sizes = files.list()
    chosen = {path: sizes[path]}
    if TOKENIZER in sizes:
        chosen |= {side: size for side, size in side_files(sizes).items() if side != CONFIG}
    notes = left_out_note(other for other in sizes if other not in chosen)
    return FileChoice(weights=(path,), index=None, files=chosen, notes=tuple(notes))


def choose_files(files: ReadableFiles) -> FileChoice:
    """The files that make up the model, from their names and the index.

    Raises ModelRefused if there are no weights, if the index names other files than there are, and for
    files beyond the limits.
    """
    sizes = files.list()
    index = read_index(files, sizes)
    notes: list[str] = []
    if index is not None and SINGLE in sizes and not any(file in sizes for file in index.values()):
        index = None
        notes.append(f"{SINGLE} is the model: none of the files that {INDEX} names is there")
    elif index is not None and SINGLE in sizes and SINGLE not in index.values():
        # As vLLM does. transformers takes the single file, which nothing vouches for: an index names each
        # tensor, and who writes shards over an older file leaves exactly this behind.
        notes.append(
            f"the files of {INDEX} are the model, as for vLLM; transformers would open {SINGLE}, which lies "
            "beside them and is left out: remove the one that is out of date"
        )
    weights = weight_files(files.name, sizes, index)
    chosen = {path: sizes[path] for path in weights}
    if index is not None:
        chosen[INDEX] = sizes[INDEX]
    chosen |= side_files(sizes)
    notes.extend(left_out_note(path for path in sizes if path not in chosen))
    return FileChoice(weights=tuple(weights), index=index, files=chosen, notes=tuple(notes))


def read_index(files: ReadableFiles, sizes: Mapping[str, int]) -> dict[str, str] | None:
    """The file of each tensor, from the index of a sharded model; None without an index."""
    if INDEX not in sizes:
        return None
    weight_map = read_json(files, INDEX, sizes, MAX_INDEX_BYTES).value.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refused("model_index_invalid", f"{INDEX} holds no weight_map", "export the model again")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise refused(
            "model_index_invalid", f"{INDEX}: a weight_map value is not a file name", f"repair {INDEX}"
        )
    return weight_map


def weight_files(name: str, sizes: Mapping[str, int], index: Mapping[str, str] | None) -> list[str]:
    """The safetensors files that hold the model's tensors, sorted."""
    if index is not None:
        weights = sorted(set(index.values()))
        for file in weights:
            if "/" in file or "\\" in file or not file.endswith(".safetensors"):
                raise refused("model_index_invalid", f"{INDEX} names {file!r}, which is not a file beside it",
                              f"repair {INDEX}")  # fmt: skip
            if file not in sizes:
                raise refused("model_shard_missing", f"{INDEX} names {file}, which does not exist",
                              "download the missing shard")  # fmt: skip
    elif SINGLE in sizes:
        weights = [SINGLE]
    else:
        top = sorted(path for path in sizes if path.endswith(".safetensors") and "/" not in path)
        weights = [path for path in top if not FOREIGN.fullmatch(path)]
    if not weights:
        refuse_without_safetensors(name, sizes)
    if len(weights) > MAX_SHARDS:
        raise refused("model_too_many_files", f"{len(weights)} shards; at most {MAX_SHARDS} are allowed",
                      "write fewer, larger shards")  # fmt: skip
    return weights


def refuse_without_safetensors(name: str, sizes: Mapping[str, int]) -> None:
    foreign = sorted(path for path in sizes if FOREIGN.fullmatch(path))
    if foreign:
        raise refused(
            "model_weights_missing",
            f"{name} holds no weights in transformers' layout, only {', '.join(foreign[:3])}",
            "convert the weights to transformers' layout; of an adapter give the base model as `model`, "
            "and it as `adapter`",
        )
    pickles = sorted(path for path in sizes if path.lower().endswith(PICKLES))
    if pickles:
        raise refused(
            "model_pickle_only",
            f"{name} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run code",
            "convert the weights to safetensors, or choose a revision that has them",
        )
    raise refused(
        "model_weights_missing",
        f"{name} holds no *.safetensors file",
        "give the folder that holds the weights",
    )


def side_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """The files beside the weights that loaders open by name."""
    chosen = {path: size for path, size in sizes.items() if SIDE_FILES.fullmatch(path)}
    for path, size in chosen.items():
        if size > MAX_SIDE_BYTES:
            raise refused("model_file_too_large", f"{path}: {size} bytes; at most {MAX_SIDE_BYTES}",
                          "export the tokenizer again")  # fmt: skip
    return chosen


def left_out_note(paths: Iterable[str]) -> Iterator[str]:
    """The ignored files of the folder, documents excepted."""
    names = sorted(path for path in paths if not DOCUMENTS.fullmatch(path))
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"left out, as no part of the model: {', '.join(names[:NAMED])}{more}"


def is_code(path: str) -> bool:
    return PurePosixPath(path.lower()).suffix in (".py", ".pyc", ".so")
