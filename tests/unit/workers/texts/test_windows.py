"""Documents to windows: nothing is dropped, everything is reproducible, faults are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from app.core.errors import TextRefused
from app.core.records.specs import CalibrationSpec, EvaluationSpec
from tests.tiny_models import TOKENIZER
from workers.texts.windows import Windows, calibration_windows, evaluation_windows, load_tokenizer

LENGTH = 8
WORDS = "the river runs past the old town and under the bridge "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(TOKENIZER)


def calibration(**changes: object) -> CalibrationSpec:
    return CalibrationSpec.model_validate({"num_samples": 4, "sequence_length": LENGTH, **changes})


def lines(folder: Path, *entries: object, name: str = "text.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), "utf-8")
    return file


def stream(windows: Windows) -> list[int]:
    tokens: list[int] = windows.tokens.flatten().tolist()
    return tokens


def test_documents_long_and_short_are_joined_and_none_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ("A", WORDS * 20, "short one", WORDS)
    spec = EvaluationSpec(texts=texts, num_samples=20)
    expected: list[int] = []
    for text in texts:
        if expected:
            expected.append(tokenizer.eos_token_id)
        expected += tokenizer(text)["input_ids"]
    windows = evaluation_windows(spec, LENGTH, tokenizer, None)
    assert windows.available == len(expected) // LENGTH > 20
    assert stream(windows) == expected[: 20 * LENGTH]
    whole = evaluation_windows(
        spec.model_copy(update={"num_samples": windows.available}), LENGTH, tokenizer, None
    )
    assert stream(whole) == expected[: len(expected) // LENGTH * LENGTH]


def test_calibration_windows_are_drawn_with_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = calibration(num_samples=16, texts=[" ".join(str(number) for number in range(400))])
    first, again = (calibration_windows(spec, tokenizer, None) for _ in range(2))
    other = calibration_windows(spec.model_copy(update={"seed": 1}), tokenizer, None)
    assert torch.equal(first.tokens, again.tokens)
    assert first.digest == again.digest != other.digest
    assert first.tokens.shape == (16, LENGTH)


def test_windows_are_drawn_without_replacement(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = (" ".join(str(number) for number in range(400)),)
    ordered = evaluation_windows(EvaluationSpec(texts=texts, num_samples=1), LENGTH, tokenizer, None)
    spec = calibration(texts=texts, num_samples=ordered.available)
    drawn = calibration_windows(spec, tokenizer, None)
    everything = evaluation_windows(
        EvaluationSpec(texts=texts, num_samples=ordered.available), LENGTH, tokenizer, None
    )
    assert drawn.tokens.tolist() != everything.tokens.tolist()
    assert sorted(drawn.tokens.tolist()) == sorted(everything.tokens.tolist())


def test_calibration_and_evaluation_read_different_text(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = EvaluationSpec(num_samples=50)
    held_out = evaluation_windows(spec, 64, tokenizer, None).tokens.tolist()
    drawn = calibration_windows(
        calibration(num_samples=50, sequence_length=64), tokenizer, None
    ).tokens.tolist()
    assert not any(window in held_out for window in drawn)


def test_too_little_text_is_refused_with_what_there_is(tokenizer: PreTrainedTokenizerBase) -> None:
    count = len(tokenizer(WORDS)["input_ids"])
    with pytest.raises(
        TextRefused, match=f"gives {count} tokens, {count // LENGTH} windows of 8; 50"
    ) as refusal:
        calibration_windows(calibration(texts=[WORDS], num_samples=50), tokenizer, None)
    assert refusal.value.code == "text_too_short"


@pytest.mark.parametrize("content", ["", "  \n\n "])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_an_empty_file_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(TextRefused) as refusal:
        calibration_windows(calibration(), tokenizer, file)
    assert refusal.value.code == "text_empty"


def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "book.txt"
    file.write_text(WORDS * 3 + "\n\n" + WORDS * 3, "utf-8")
    windows = evaluation_windows(EvaluationSpec(num_samples=4), LENGTH, tokenizer, file)
    assert stream(windows) == tokenizer(file.read_text())["input_ids"][: 4 * LENGTH]


def test_lines_of_text_and_of_messages(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "yes"}]
    file = lines(tmp_path, {"text": "first " + WORDS}, "", {"messages": turns, "source": "web"})
    windows = evaluation_windows(EvaluationSpec(num_samples=3), LENGTH, tokenizer, file)
    rendered = f"<|im_start|>user\n{WORDS}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    expected = [
        *tokenizer("first " + WORDS)["input_ids"],
        tokenizer.eos_token_id,
        *tokenizer(rendered, add_special_tokens=False)["input_ids"],
    ]
    assert stream(windows) == expected[: 3 * LENGTH]
    assert windows.available == len(expected) // LENGTH


WITH_TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments.city }})"
    "{% endfor %}{% endfor %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL_TRAFFIC = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": WORDS}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "warm"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
}


def test_conversations_with_tools_go_through_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    windows = evaluation_windows(
        EvaluationSpec(num_samples=3), LENGTH, tokenizer, lines(tmp_path, TOOL_TRAFFIC)
    )
    rendered = f"[weather]<user>{WORDS}<assistant>(weather Rome)<tool>warm"
    assert stream(windows) == tokenizer(rendered, add_special_tokens=False)["input_ids"][: 3 * LENGTH]


@pytest.mark.parametrize("row", [
    {"prompt": WORDS, "completion": "yes"},
    {"instruction": "river", "input": "bridge", "output": "yes " + WORDS},
])  # fmt: skip
def test_questions_and_answers_are_text_or_turns_as_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, str]
) -> None:
    question, answer = list(row.values())[:-1], list(row.values())[-1]
    plain = question[0] + answer if "prompt" in row else "\n\n".join([*question, answer])
    turns = [("user", "\n\n".join(question)), ("assistant", answer)]
    rendered = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    file = lines(tmp_path, row)
    for chat_template, text in (("auto", plain), ("never", plain), ("always", rendered)):
        spec = EvaluationSpec.model_validate({"num_samples": 1, "chat_template": chat_template})
        ids = tokenizer(text, add_special_tokens=text is plain)["input_ids"]
        assert stream(evaluation_windows(spec, LENGTH, tokenizer, file)) == ids[:LENGTH]


@pytest.mark.parametrize(
    "bad",
    [
        "{not json", "[]", '"text"', {"txt": "x"}, {"text": 5}, {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": ["a part"]}]}, {"text": "half \ud800"}, "[" * 100_000,
    ],
)  # fmt: skip
def test_a_malformed_line_is_refused_with_its_number(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, bad: object
) -> None:
    file = lines(tmp_path, {"text": WORDS}, "", bad, {"text": WORDS})
    with pytest.raises(TextRefused, match=r"text\.jsonl, line 3") as refusal:
        calibration_windows(calibration(), tokenizer, file)
    assert refusal.value.code == "text_malformed"


def test_a_line_may_hold_other_line_separators(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """JSON allows U+2028 and U+0085 inside strings, and text from the web has them."""
    text = f"one\u2028two\x85three {WORDS}"
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", "utf-8")
    windows = evaluation_windows(EvaluationSpec(num_samples=1), LENGTH, tokenizer, file)
    assert stream(windows) == tokenizer(text)["input_ids"][:LENGTH]


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("stra\xdfe".encode("latin-1"))
    with pytest.raises(TextRefused, match=r"latin\.txt, line 1: not UTF-8"):
        calibration_windows(calibration(), tokenizer, file)


def test_text_becomes_a_user_turn_where_a_template_is_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = calibration(texts=[WORDS], num_samples=2, chat_template="always")
    windows = calibration_windows(spec, tokenizer, None)
    rendered = f"<|im_start|>user\n{WORDS}<|im_end|>\n"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    expected = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    assert windows.available == len(expected)
    assert all(window in expected for window in windows.tokens.tolist())


def bare_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return load_tokenizer(folder)


def test_a_missing_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer(tmp_path)
    file = lines(tmp_path, {"messages": [{"role": "user", "content": WORDS}]})
    always = calibration(texts=[WORDS], chat_template="always")
    for spec, source in ((always, None), (calibration(), file)):
        with pytest.raises(TextRefused) as refusal:
            calibration_windows(spec, tokenizer, source)
        assert refusal.value.code == "chat_template_missing"


def test_a_conversation_without_a_template_is_read_line_by_line_where_asked(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer(tmp_path)
    turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "yes"}]
    spec = EvaluationSpec(num_samples=2, chat_template="never")
    windows = evaluation_windows(spec, LENGTH, tokenizer, lines(tmp_path, {"messages": turns}))
    assert stream(windows) == tokenizer(f"user: {WORDS}\nassistant: yes\n")["input_ids"][: 2 * LENGTH]


def test_images_and_sounds_of_a_conversation_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    text = {"type": "text", "text": WORDS}
    answer = {"role": "assistant", "content": "yes"}
    shown, plain = (
        lines(tmp_path, {"messages": [{"role": "user", "content": content}, answer]}, name=name)
        for name, content in (("shown.jsonl", [picture, text, sound]), ("plain.jsonl", WORDS))
    )
    for read in (
        lambda file: evaluation_windows(EvaluationSpec(num_samples=2), LENGTH, tokenizer, file),
        lambda file: calibration_windows(calibration(num_samples=2), tokenizer, file),
    ):
        with_media, without = read(shown), read(plain)
        assert torch.equal(with_media.tokens, without.tokens)
        assert (with_media.left_out, without.left_out) == (2, 0)


def test_a_conversation_that_the_template_refuses(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    file = lines(tmp_path, {"messages": [{"role": "user", "content": WORDS}]})
    with pytest.raises(TextRefused, match="roles must alternate") as refusal:
        calibration_windows(calibration(), tokenizer, file)
    assert refusal.value.code == "chat_template_failed"


def test_an_unknown_bundled_text_is_refused_with_the_list(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TextRefused, match="builtin:pile") as refusal:
        calibration_windows(calibration(dataset="builtin:pile"), tokenizer, None)
    assert refusal.value.code == "dataset_not_found"
    assert "builtin:wikitext2" in refusal.value.remedy


def test_a_tokenizer_that_the_host_can_not_read_is_no_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library hides the number in the words of an error of its own."""
    bare_tokenizer(tmp_path)
    fault = Exception("Too many open files (os error 24)")

    def refused(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("workers.texts.windows.AutoTokenizer.from_pretrained", refused)
    with pytest.raises(Exception, match="Too many open files") as raised:
        load_tokenizer(tmp_path)
    assert raised.value is fault


WITHOUT_ITS_TOKENS = (
    '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'
)


@pytest.mark.parametrize("content", [None, "{}", "not json", WITHOUT_ITS_TOKENS])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(TextRefused) as refusal:
        load_tokenizer(tmp_path)
    assert refusal.value.code == "tokenizer_invalid"


def test_batches_split_the_windows_in_order() -> None:
    windows = Windows(torch.arange(10).view(5, 2), 5)
    assert [batch.tolist() for batch in windows.batches(2)] == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]],
    ]  # fmt: skip
