from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.errors import ModelRefused, TextRefused
from app.core.sources.file_choice import MAX_SHARDS, MAX_SIDE_BYTES, weight_files
from app.core.sources.local_model import MAX_FILES, refuse_crowd
from app.core.sources.model_headers import FIRST_READ, MAX_ALL_HEADERS, read_headers, with_code
from app.core.sources.model_source import LocalModel, ModelHeaders, inspect_model, model_digest, open_model
from app.core.sources.text_source import MAX_TEXT_BYTES, open_text


def safetensors(*names: str) -> bytes:
    """A file of one float each."""
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]}
            for index, name in enumerate(names)
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * len(names))


def index(weight_map: dict[str, object]) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


GOOD = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": safetensors("a", "b"),
    "tokenizer.json": b"{}",
    "README.md": b"hello",
}
SHARDED = {
    "config.json": b"{}",
    "one.safetensors": safetensors("a"),
    "two.safetensors": safetensors("b"),
    "model.safetensors.index.json": index({"a": "one.safetensors", "b": "two.safetensors"}),
}


def make(folder: Path, files: dict[str, bytes]) -> LocalModel:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return LocalModel(folder, [folder])


def inspect(folder: Path, files: dict[str, bytes]) -> ModelHeaders:
    return inspect_model(make(folder, files))


def test_headers_of_a_single_file(tmp_path: Path) -> None:
    headers = inspect(tmp_path, GOOD)
    assert headers.config == {"model_type": "llama"}
    assert list(headers.tensors) == ["a", "b"]
    assert set(headers.files) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_headers_of_shards(tmp_path: Path) -> None:
    headers = inspect(tmp_path, SHARDED)
    assert {name: tensor.file for name, tensor in headers.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_headers_longer_than_the_first_read(tmp_path: Path) -> None:
    names = [f"tensor.{number:06d}" for number in range(3000)]
    headers = inspect(tmp_path, {**GOOD, "model.safetensors": safetensors(*names)})
    assert list(headers.tensors) == names


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    assert inspect(tmp_path, {**GOOD, "pytorch_model.bin": b"x", "original/c.pth": b"x"}).tensors


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_pickles_alone_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        inspect(tmp_path, {"config.json": b"{}", f"weights.{suffix}": b"x"})
    assert refusal.value.code == "model_pickle_only"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"config.json": b"{"}, "model_config_invalid"),
        ({"config.json": b"[]"}, "model_config_invalid"),
        ({"config.json": b"\xff"}, "model_config_invalid"),
        ({"config.json": b"[" * 200_000}, "model_config_invalid"),
        ({"config.json": b'{"x": "' + b"y" * (4 << 20) + b'"}'}, "model_file_too_large"),
        ({"model.safetensors": safetensors("a")[:-1]}, "model_header_invalid"),
        ({"model.safetensors": b"\xff" * 64}, "model_header_invalid"),
        ({"model.safetensors": b""}, "model_header_invalid"),
        ({"model.safetensors": safetensors()}, "model_weights_missing"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, changes: dict[str, bytes], code: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        inspect(tmp_path, {**GOOD, **changes})
    assert refusal.value.code == code
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model.safetensors.index.json": index({"a": "gone.safetensors"})}, "model_shard_missing"),
        ({"model.safetensors.index.json": index({"a": "../one.safetensors"})}, "model_index_invalid"),
        ({"model.safetensors.index.json": index({"a": "weights.bin"})}, "model_index_invalid"),
        ({"model.safetensors.index.json": index({"a": 1})}, "model_index_invalid"),
        ({"model.safetensors.index.json": index({})}, "model_index_invalid"),
        ({"model.safetensors.index.json": index({"z": "one.safetensors"})}, "model_index_invalid"),
        ({"two.safetensors": safetensors("a", "b")}, "model_tensor_twice"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(
    tmp_path: Path, changes: dict[str, bytes], code: str
) -> None:
    with pytest.raises(ModelRefused) as refusal:
        inspect(tmp_path, {**SHARDED, **changes})
    assert refusal.value.code == code


CODE = {"AutoModelForCausalLM": "modeling_x.X"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"modeling_x.py": b"x"}, ("modeling_x.py",)),
        ({"deep/inside/x.PY": b"x", "y.so": b"x"}, ("deep/inside/x.PY", "y.so")),
        ({"config.json": json.dumps({"auto_map": CODE}).encode()}, ("auto_map in config.json",)),
        ({"config.json": json.dumps({"t": [{"auto_map": CODE}]}).encode()}, ("auto_map in config.json",)),
    ],
)
def test_code_beside_a_model_is_left_out_and_told(
    tmp_path: Path, changes: dict[str, bytes], code: tuple[str, ...]
) -> None:
    headers = inspect(tmp_path, {**GOOD, **changes})
    assert headers.code == code
    assert set(headers.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert "auto_map" not in json.dumps(headers.config)
    assert all(any(name.partition(" ")[0] in note for note in headers.notes) for name in code)


def test_an_unknown_architecture_with_code_is_refused_for_the_code() -> None:
    unknown = ModelRefused("the architecture x is not supported", code="architecture_unsupported", remedy="r")
    refusal = with_code(unknown, ("modeling_x.py",))
    assert refusal.code == "model_remote_code"
    assert "modeling_x.py" in refusal.message
    assert with_code(unknown, ()) is unknown
    other = ModelRefused("no layers", code="config_invalid", remedy="r")
    assert with_code(other, ("modeling_x.py",)) is other


def test_a_tokenizer_that_only_its_code_opens_is_refused(tmp_path: Path) -> None:
    settings = {"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'}
    assert "tokenizer_config.json" in inspect(tmp_path / "fast", {**GOOD, **settings}).files
    slow = {name: content for name, content in GOOD.items() if name != "tokenizer.json"}
    with pytest.raises(ModelRefused, match=r"no tokenizer\.json") as refusal:
        inspect(tmp_path / "slow", {**slow, **settings})
    assert refusal.value.code == "model_remote_code"


def test_a_config_that_names_other_weights_is_refused(tmp_path: Path) -> None:
    config = {"config.json": b'{"transformers_weights": "other.safetensors"}'}
    with pytest.raises(ModelRefused, match="transformers_weights") as refusal:
        inspect(tmp_path, {**GOOD, **config, "other.safetensors": safetensors("a")})
    assert refusal.value.code == "model_weights_ambiguous"


def test_config_and_weights_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused) as refusal:
        inspect(tmp_path, {"model.safetensors": safetensors("a")})
    assert refusal.value.code == "model_config_missing"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelRefused) as refusal:
        inspect(tmp_path, {"config.json": b"{}"})
    assert refusal.value.code == "model_weights_missing"


def test_a_folder_outside_the_roots_is_refused_whether_or_not_it_exists(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "gone", root / "link", tmp_path / "rooted"):
        with pytest.raises(ModelRefused) as refusal:
            open_model(folder.as_uri(), model_roots=[root])
        assert refusal.value.code == "model_path_forbidden"
    with pytest.raises(ModelRefused) as refusal:
        open_model((root / "gone").as_uri(), model_roots=[root])
    assert refusal.value.code == "model_not_found"


def test_a_link_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("{}")
    root = tmp_path / "root"
    model = make(root, GOOD)
    (root / "generation_config.json").symlink_to(outside)
    with pytest.raises(ModelRefused) as refusal:
        inspect_model(model)
    assert refusal.value.code == "model_path_forbidden"


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path, GOOD)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelRefused, match=r"config\.json can't be read: No such file") as refusal:
        model.read("config.json", 0, 1)
    assert refusal.value.code == "model_unreadable"


def test_a_link_within_the_roots_is_followed(tmp_path: Path) -> None:
    make(tmp_path / "blobs", GOOD)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name in GOOD:
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    headers = inspect_model(LocalModel(folder, [tmp_path]))
    assert list(headers.tensors) == ["a", "b"]


def test_the_content_key_changes_with_a_file(tmp_path: Path) -> None:
    model = make(tmp_path, GOOD)
    before = model.content_key()
    assert model.content_key() == before
    os.utime(tmp_path / "config.json", ns=(1, 1))
    assert model.content_key() != before


def test_download_copies_and_reports(tmp_path: Path) -> None:
    model = make(tmp_path / "model", GOOD)
    received: list[int] = []
    model.download("README.md", tmp_path / "copy", received.append)
    assert (tmp_path / "copy").read_bytes() == b"hello"
    assert sum(received) == 5


def test_the_digest_names_files_and_contents() -> None:
    assert model_digest({"a": "1", "b": "2"}) == model_digest({"b": "2", "a": "1"})
    assert model_digest({"a": "1", "b": "2"}) != model_digest({"a": "2", "b": "1"})


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "chat_template.jinja"])
def test_a_tokenizer_has_a_most_of_bytes(tmp_path: Path, name: str) -> None:
    model = make(tmp_path, GOOD)
    sparse(tmp_path / name, MAX_SIDE_BYTES)
    assert inspect_model(model).files[name] == MAX_SIDE_BYTES
    sparse(tmp_path / name, MAX_SIDE_BYTES + 1)
    with pytest.raises(ModelRefused, match=name) as refusal:
        inspect_model(model)
    assert refusal.value.code == "model_file_too_large"


class Claims:
    """Files whose headers claim so many bytes."""

    name = "claims"

    def __init__(self, count: int, length: int) -> None:
        self.sizes = {f"{number}.safetensors": 2**40 for number in range(count)}
        self.length = length

    def list(self) -> dict[str, int]:
        return self.sizes

    def read(self, path: str, start: int, length: int) -> bytes:
        assert length <= FIRST_READ, "a header was read that is too long together with the others"
        return self.length.to_bytes(8, "little")


def test_headers_have_a_most_of_bytes_together() -> None:
    files = Claims(3, MAX_ALL_HEADERS // 2)
    with pytest.raises(ModelRefused, match="together") as refusal:
        read_headers(files, list(files.sizes), files.sizes)
    assert refusal.value.code == "model_header_invalid"


def test_a_model_has_a_most_of_shards_and_files() -> None:
    many = {f"{number}.safetensors": 8 for number in range(MAX_SHARDS + 1)}
    with pytest.raises(ModelRefused) as refusal:
        weight_files("many", many, None)
    assert refusal.value.code == "model_too_many_files"
    refuse_crowd("many", MAX_FILES)
    with pytest.raises(ModelRefused) as refusal:
        refuse_crowd("many", MAX_FILES + 1)
    assert refusal.value.code == "model_too_many_files"


def test_a_local_text_is_found(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    text = open_text((tmp_path / "text.jsonl").as_uri(), model_roots=[tmp_path])
    assert text.files.read(text.path, 0, text.size) == b'{"text": "x"}\n'


def test_a_text_has_a_most_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    sparse(path, MAX_TEXT_BYTES + 1)
    with pytest.raises(TextRefused, match="at most") as refusal:
        open_text(path.as_uri(), model_roots=[tmp_path])
    assert refusal.value.code == "text_source_invalid"


@pytest.mark.parametrize(
    "reference",
    ["file:///etc/hosts.txt", "file:///etc/passwd", "{root}/gone.txt", "gopher://x/y.txt", "hf:org/../x.txt"],
)
def test_a_text_that_may_not_be_read_is_refused(tmp_path: Path, reference: str) -> None:
    with pytest.raises(TextRefused) as refusal:
        open_text(reference.format(root=tmp_path.as_uri()), model_roots=[tmp_path])
    assert refusal.value.code == "text_source_invalid"


def test_a_text_outside_of_the_roots_is_told_what_to_move(tmp_path: Path) -> None:
    with pytest.raises(TextRefused) as refusal:
        open_text("file:///etc/hosts.txt", model_roots=[tmp_path])
    assert "NIBBLE_MODEL_ROOTS" in refusal.value.remedy


def test_the_hub_client_brings_no_torch() -> None:
    program = (
        "import sys; from huggingface_hub import HfApi; "
        "import app.core.sources.model_source, app.core.sources.text_source; "
        "print([name for name in ('torch', 'numpy', 'transformers', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
