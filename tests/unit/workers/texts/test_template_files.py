"""Every place where a model's files can hold chat templates, for calibration and for serving alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from app.core.errors import InvalidRequest, ModelRefused, TextRefused
from app.core.records.specs import CalibrationSpec
from tests.inference import Served
from tests.tiny_models import TOKENIZER, random_model, save_model
from workers.serving.protocol import ChatRequest
from workers.serving.served_model import ServedModel
from workers.texts.documents import Document
from workers.texts.windows import all_windows, load_tokenizer

DEFAULT = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOL_USE = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + DEFAULT
LISTED = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": TOOL_USE}]
TOOLS = [{"type": "function", "function": {"name": "visit", "parameters": {"type": "object"}}}]
MESSAGES = [
    {"role": "user", "content": "Where to, and for how many days, and what do we take with us?"},
    {"role": "assistant", "content": "To the sea."},
]


def folder_of_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(DEFAULT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{% for %}")


def in_tokenizer_config(template: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))

    return write


def in_chat_template_json(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TOOL_USE}))


def in_chat_template_jinja(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TOOL_USE)


PLACES = {
    "additional_chat_templates": folder_of_templates,
    "list in tokenizer_config.json": in_tokenizer_config(LISTED),
    "text in tokenizer_config.json": in_tokenizer_config(TOOL_USE),
    "chat_template.json": in_chat_template_json,
    "chat_template.jinja": in_chat_template_jinja,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return Served(save_model(random_model("llama"), tmp_path_factory.mktemp("model"))).served


def model_folder(folder: Path, place: Callable[[Path], None]) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    place(folder)
    return folder


def calibrated(folder: Path, tools: list[dict[str, Any]] | None) -> str:
    """The text of the windows that a conversation gives."""
    tokenizer, size = load_tokenizer(folder), 4
    windows = all_windows(
        CalibrationSpec(num_samples=2, sequence_length=size * 4), size, tokenizer,
        [Document(messages=MESSAGES, tools=tools)],
    )  # fmt: skip
    return str(tokenizer.decode(windows.flatten()))


def answered(served: ServedModel, folder: Path, tools: list[dict[str, Any]] | None) -> str:
    """The prompt of a request to a server that has the folder's tokenizer."""
    served.tokenization.template = type(served.tokenization)(folder, 4096).template
    body = {"messages": MESSAGES, "tools": tools, "add_generation_prompt": False}
    return served.render(ChatRequest.model_validate(body))


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("place", PLACES)
def test_templates_are_read_wherever_they_are(
    tmp_path: Path, served: ServedModel, place: str, tools: list[dict[str, Any]] | None
) -> None:
    folder = model_folder(tmp_path, PLACES[place])
    (folder / "generation_config.json").write_text("{}")
    judge = AutoTokenizer.from_pretrained(folder)
    if place == "chat_template.json":  # processors read it, and this model has none
        assert judge.chat_template is None
        judge.chat_template = TOOL_USE
    expected = judge.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
    assert expected.startswith("visit" if tools else judge.bos_token)
    assert answered(served, folder, tools) == expected
    found = calibrated(folder, tools)
    assert len(found) > len(expected) - 20  # a last window that is not full is dropped
    assert expected.startswith(found)


@pytest.mark.parametrize("template", ["{% if %}", [{"name": "default", "template": "{{"}], {"default": 5}])
def test_a_template_that_is_none_is_refused_for_both(
    tmp_path: Path, served: ServedModel, template: object
) -> None:
    folder = model_folder(tmp_path, in_tokenizer_config(template))
    (folder / "generation_config.json").write_text("{}")
    for use in (lambda: calibrated(folder, None), lambda: answered(served, folder, None)):
        with pytest.raises(ModelRefused) as refusal:
            use()
        assert refusal.value.code == "chat_template_invalid"


def test_a_refusal_by_the_template_has_the_words_of_its_surface(tmp_path: Path, served: ServedModel) -> None:
    folder = model_folder(tmp_path, in_tokenizer_config("{{ raise_exception('roles must alternate') }}"))
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(TextRefused, match="roles must alternate") as text:
        calibrated(folder, None)
    assert text.value.code == "chat_template_failed"
    with pytest.raises(InvalidRequest, match="roles must alternate") as request:
        answered(served, folder, None)
    assert (request.value.code, request.value.param) == ("chat_template_refused", "messages")


def test_plain_text_needs_no_template_that_works(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, in_tokenizer_config("{% if %}"))
    spec = CalibrationSpec(num_samples=1, sequence_length=16)
    windows = all_windows(spec, 4, load_tokenizer(folder), [Document(text="some words " * 20)])
    assert windows.shape[1] == 4
