"""Which files of a folder are the model: every kind of stray file, and what is said of it."""

from __future__ import annotations

import json

import pytest

from app.core.errors import ModelRefused
from app.core.sources.file_choice import INDEX, SINGLE, choose_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "tokenizer.model.v3",
    "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.4.0.0.json",
)  # fmt: skip
STRAY = (
    "model_old.safetensors", "model.fp16.safetensors", "consolidated.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json", "pytorch_model.bin", "model.gguf", "original/consolidated.00.pth",
    "original/params.json", "original/tokenizer.model", "onnx/model.onnx", "modeling_x.py", "handler.py",
    "kernels/x.so", "params.json", "quantize_config.json", "quant_config.json", "training_args.bin",
    "chat_template_old.jinja", "additional_chat_templates/deep/x.jinja", "1_Pooling/config.json",
    "checkpoint-500/model.safetensors", "pytorch_model.bin.index.json", "consolidated.safetensors.index.json",
)  # fmt: skip
DOCUMENTS = ("README.md", "LICENSE", "USE_POLICY.txt", ".gitattributes", ".cache/x.json", "images/a.PNG")


class Folder:
    """Files by their contents, or of no content that matters."""

    name = "folder"

    def __init__(self, *names: str, index: dict[str, str] | None = None) -> None:
        self.contents = dict.fromkeys(names, b"{}")
        if index is not None:
            self.contents[INDEX] = json.dumps({"weight_map": index}).encode()

    def list(self) -> dict[str, int]:
        return {name: len(content) for name, content in self.contents.items()}

    def read(self, path: str, start: int, length: int) -> bytes:
        return self.contents[path][start : start + length]


SHARD_INDEX = {"a": SHARDS[0], "b": SHARDS[1]}


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_stray_file_is_left_out_and_noted(stray: str, sharded: bool) -> None:
    weights = SHARDS if sharded else (SINGLE,)
    folder = Folder(*SIDE, *weights, *DOCUMENTS, stray, index=SHARD_INDEX if sharded else None)
    choice = choose_files(folder)
    assert choice.weights == weights
    assert set(choice.files) == {*SIDE, *weights, *([INDEX] if sharded else [])}
    assert set(choice.side_files) == set(SIDE)
    assert choice.notes == (f"left out, as no part of the model: {stray}",)


def test_a_clean_folder_needs_no_note() -> None:
    assert choose_files(Folder(*SIDE, *DOCUMENTS, SINGLE)).notes == ()


def test_of_many_stray_files_some_are_named() -> None:
    (note,) = choose_files(Folder(SINGLE, *STRAY)).notes
    assert note.endswith(f" and {len(STRAY) - 5} more")
    assert note.count(",") == 5


def test_an_index_counts_more_than_a_single_file_beside_it() -> None:
    choice = choose_files(Folder(SINGLE, *SHARDS, index=SHARD_INDEX))
    assert choice.weights == SHARDS
    assert SINGLE not in choice.files
    assert "as for vLLM; transformers would open model.safetensors" in choice.notes[0]


def test_an_index_whose_files_are_gone_counts_less_than_a_single_file() -> None:
    choice = choose_files(Folder(SINGLE, index=SHARD_INDEX))
    assert (choice.weights, choice.index) == ((SINGLE,), None)
    assert INDEX not in choice.files
    assert choice.notes[0].startswith("model.safetensors is the model: none of the files that")


def test_an_index_of_which_a_file_is_gone_is_refused() -> None:
    with pytest.raises(ModelRefused) as refusal:
        choose_files(Folder(SINGLE, SHARDS[0], index=SHARD_INDEX))
    assert refusal.value.code == "model_shard_missing"


def test_an_index_may_name_the_single_file() -> None:
    choice = choose_files(Folder(SINGLE, index={"a": SINGLE}))
    assert (choice.weights, choice.notes) == ((SINGLE,), ())


def test_without_index_and_single_file_all_at_the_top_count_but_those_of_another_layout() -> None:
    choice = choose_files(Folder(*SHARDS, "consolidated.safetensors", "adapter_model.safetensors"))
    assert choice.weights == SHARDS
    assert choice.notes == (
        "left out, as no part of the model: adapter_model.safetensors, consolidated.safetensors",
    )


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_weights_of_another_layout_alone_are_refused(name: str) -> None:
    with pytest.raises(ModelRefused, match="no weights in transformers' layout, only " + name) as refusal:
        choose_files(Folder("config.json", name))
    assert refusal.value.code == "model_weights_missing"
