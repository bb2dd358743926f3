"""Every place where a model's files can hold chat templates, for calibration and for serving alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from app.core.errors import InvalidRequest, ModelRefused, TextRefused
from app.core.records.specs import CalibrationSpec
from tests.inference import Served
from tests.tiny_models import TOKENIZER, random_model, save_model
from workers.child.work import template_note
from workers.serving.conversations import render, template_of
from workers.serving.protocol import ChatRequest
from workers.serving.tokenization import Tokenization
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
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(save_model(random_model("llama"), tmp_path_factory.mktemp("model")))


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


def answered(served: Served, folder: Path, tools: list[dict[str, Any]] | None) -> str:
    """The prompt of a request to a server that has the folder's tokenizer."""
    served.tokenization.template = Tokenization(folder, 4096).template
    body = {"messages": MESSAGES, "tools": tools, "add_generation_prompt": False}
    return render(template_of(served.tokenization), ChatRequest.model_validate(body))


def asked(served: Served, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Answers of the routes, a chat for messages and a completion else."""
    return [
        served.post("/v1/chat/completions" if "messages" in body else "/v1/completions", body)
        for body in bodies
    ]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("place", PLACES)
def test_templates_are_read_wherever_they_are(
    tmp_path: Path, served: Served, place: str, tools: list[dict[str, Any]] | None
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


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{% foo %}", "{{ x | nope }}", [{"name": "default", "template": "{{"}], {"default": 5}],
)
def test_a_template_that_is_none_is_refused_where_it_is_needed(
    tmp_path: Path, served: Served, template: object
) -> None:
    """Calibration on conversations and chats; a server starts with it, and completes texts."""
    folder = model_folder(tmp_path, in_tokenizer_config(template))
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(ModelRefused) as refusal:
        calibrated(folder, None)
    assert refusal.value.code == "chat_template_invalid"
    served.tokenization.template = Tokenization(folder, 4096).template
    chat, text = asked(
        served, {"messages": MESSAGES, "max_tokens": 2}, {"prompt": "To the sea", "max_tokens": 2}
    )
    error = chat.json()["error"]
    assert (chat.status_code, error["code"], error["param"]) == (400, "chat_template_invalid", "messages")
    assert refusal.value.message in error["message"]
    assert "/v1/completions" in error["message"]
    assert (text.status_code, text.json()["usage"]["completion_tokens"]) == (200, 2)
    note = template_note(load_tokenizer(folder))
    assert note is not None
    assert refusal.value.message in note


@pytest.mark.parametrize("place", PLACES)
def test_a_template_that_is_one_is_not_noted(tmp_path: Path, place: str) -> None:
    assert template_note(load_tokenizer(model_folder(tmp_path, PLACES[place]))) is None


@pytest.mark.parametrize(
    ("content", "code", "message", "remedy"),
    [
        ("{}", "chat_template_invalid", "holds no chat_template", "under the key chat_template"),
        ('{"template": "x"}', "chat_template_invalid", "holds no chat_template", "under the key"),
        ("[]", "model_config_invalid", "is not a JSON object", "repair chat_template.json"),
        ("{", "model_config_invalid", "is not valid JSON", "repair chat_template.json"),
    ],
)
def test_a_file_without_its_template_is_named(
    tmp_path: Path, content: str, code: str, message: str, remedy: str
) -> None:
    """It was told as a tokenizer that can't be loaded: "'chat_template'"."""
    folder = model_folder(tmp_path, lambda folder: None)
    (folder / "chat_template.json").write_text(content)
    with pytest.raises(ModelRefused, match=f"chat_template.json {message}") as refusal:
        load_tokenizer(folder)
    assert refusal.value.code == code
    assert remedy in refusal.value.remedy


def test_a_refusal_by_the_template_has_the_words_of_its_surface(tmp_path: Path, served: Served) -> None:
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
