"""A model's own answers as calibration text: the same again, bounded, and read by whoever goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.core.child.assignment import CHECKPOINTS, Checkpointed, Noted
from app.core.errors import ModelRefused, NibbleError, OutOfMemory, TextRefused
from app.core.records.specs import CalibrationSpec
from tests.tiny_models import EngineRun, assignment, tiny_model, tiny_spec
from workers.child import work as work_module
from workers.child.own_answers import (
    ANSWER_TOKENS,
    KEY,
    ROWS,
    AnswerSampling,
    AnswersFile,
    answered,
    own_answers,
    prompt_ids,
    prompts,
    whole_model,
)
from workers.child.stage_clock import StageClock
from workers.child.work import Work, read_texts, write_answers
from workers.devices.device_memory import UNKNOWN, DeviceMemory
from workers.texts.windows import Windows, load_tokenizer

SELF = {"dataset": "self", "num_samples": 4, "sequence_length": 32}
OWN_SAMPLING = AnswerSampling({"temperature": 0.7, "top_p": 0.95, "top_k": 0}, frozenset({0}))


def opened(model: Path, folder: Path, **changes: object) -> Work:
    spec = tiny_spec(calibration={**SELF, **changes})
    return Work.open(assignment(spec, model, folder))


def written(model: Path, folder: Path, **changes: object) -> Windows:
    work = opened(model, folder, **changes)
    write_answers(work, StageClock(lambda _: None, work.device, work.plan.num_layers))
    return read_texts(work).calibration


def test_prompts_are_many_and_differ() -> None:
    every = prompts()
    assert len(set(every)) == len(every) >= 90
    assert len(every) % ROWS == 0  # a round of all prompts is whole batches
    assert all(prompt == prompt.strip() and prompt for prompt in every)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    first, again = (written(model, tmp_path / name) for name in ("first", "again"))
    other = written(model, tmp_path / "other", seed=1)
    assert first.tokens.shape == (4, 32)
    assert first.digest == again.digest != other.digest


def test_the_state_of_other_random_numbers_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    written(tiny_model(tmp_path / "model"), tmp_path / "work")
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)
    state = torch.get_rng_state()
    written(tmp_path / "model", tmp_path / "later")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16}),
        ("mixtral", {"num_local_experts": 4}),
        ("opt", {"ffn_dim": 128}),
        ("gpt_neox", {}),
    ],
)
def test_answers_are_those_of_transformers_own_model(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    model = tiny_model(tmp_path / "model", model_type, **changes)
    work = opened(model, tmp_path / "work")
    rows, settings = [[5, 6, 7, 8], [9], [10, 11]], OWN_SAMPLING.config(12)
    with whole_model(work.decoder()) as whole:
        torch.manual_seed(3)
        ours = answered(whole, rows, settings, OWN_SAMPLING.ends)
    torch.manual_seed(3)
    reference = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation=work.plan.architecture.attention
    )
    assert answered(reference, rows, settings, OWN_SAMPLING.ends) == ours
    assert all(text[: len(row)] == row for text, row in zip(ours, rows, strict=True))
    assert max(len(text) - len(row) for text, row in zip(ours, rows, strict=True)) == 12


def test_an_answer_ends_with_its_end_token(tmp_path: Path) -> None:
    work = opened(tiny_model(tmp_path / "model"), tmp_path / "work")
    half = frozenset(range(2048))
    sampling = AnswerSampling(OWN_SAMPLING.parameters, half)
    with whole_model(work.decoder()) as whole:
        torch.manual_seed(0)
        texts = answered(whole, [[3000, 3001]] * ROWS, sampling.config(ANSWER_TOKENS), half)
    answers = [text[2:] for text in texts]
    assert all(answer[-1] in half and not half.intersection(answer[:-1]) for answer in answers)
    assert len({len(answer) for answer in answers}) > 1


def test_a_resumed_job_reads_the_same_text_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = tiny_model(tmp_path / "model"), tiny_spec(calibration=SELF)
    whole = EngineRun(spec, model, tmp_path / "whole")
    checkpoints = [message.key for message in whole.messages if isinstance(message, Checkpointed)]
    assert checkpoints[0] == KEY
    notes = [message.message for message in whole.messages if isinstance(message, Noted)]
    assert any("the model's own answers to" in note for note in notes)
    assert whole.report.stages["calibrating"] > 0

    (tmp_path / "resumed" / CHECKPOINTS).mkdir(parents=True)
    shutil.copyfile(tmp_path / "whole" / CHECKPOINTS / KEY, tmp_path / "resumed" / CHECKPOINTS / KEY)
    monkeypatch.setattr(work_module, "own_answers", lambda *_: pytest.fail("the model was asked again"))
    resumed = EngineRun(spec, model, tmp_path / "resumed")
    assert resumed.texts().calibration.digest == whole.texts().calibration.digest
    weights = [run.folder("compressed-tensors") / "model.safetensors" for run in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_answers_of_another_model_are_not_read(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    written(model, tmp_path / "work")
    mine = opened(model, tmp_path / "work").assignment
    assert AnswersFile.of(mine).exists
    for change in ({"model_digest": "1" * 64}, {"spec": tiny_spec(calibration={**SELF, "seed": 1})}):
        assert not AnswersFile.of(mine.model_copy(update=change)).exists


def test_prompts_go_through_the_template_where_there_is_one(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    plain = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts()]
    rendered = f"<|im_start|>user\n{prompts()[0]}<|im_end|>\n<|im_start|>assistant\n"
    first = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    for use in ("auto", "always"):
        asked = prompt_ids(CalibrationSpec.model_validate({"chat_template": use}), tokenizer)
        assert (asked[0], len(asked)) == (first, len(plain))
    assert prompt_ids(CalibrationSpec(chat_template="never"), tokenizer) == plain
    (folder / "chat_template.jinja").unlink()
    bare = load_tokenizer(folder)
    assert prompt_ids(CalibrationSpec(), bare) == plain
    with pytest.raises(TextRefused) as refusal:
        prompt_ids(CalibrationSpec(chat_template="always"), bare)
    assert refusal.value.code == "chat_template_missing"
    bare.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(TextRefused) as refusal:
        prompt_ids(CalibrationSpec(), bare)
    assert refusal.value.code == "chat_template_failed"


def test_answers_are_drawn_as_the_model_is_served(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = folder / "generation_config.json"
    settings.write_text('{"temperature": 0.3, "top_k": 5, "eos_token_id": [0, 7], "do_sample": true}')
    sampling = AnswerSampling.of(folder, tokenizer)
    assert sampling.parameters == {"temperature": 0.3, "top_k": 5}
    assert sampling.ends == {0, 7}
    settings.write_text('{"temperature": 0.0, "do_sample": false}')  # no sample: each round would be the same
    assert AnswerSampling.of(folder, tokenizer).parameters == {"temperature": 0.7, "top_k": 0}


def test_a_model_that_says_little_is_refused(tmp_path: Path) -> None:
    work = opened(tiny_model(tmp_path / "model"), tmp_path / "work")
    mute = AnswerSampling(OWN_SAMPLING.parameters, frozenset(range(4096)))
    with pytest.raises(
        TextRefused, match="own answers are short: 32 with their prompts have 95 tokens"
    ) as refusal:
        own_answers(work.decoder(), [[5]], work.spec.calibration, mute, 0)
    assert (refusal.value.code, refusal.value.param) == ("text_too_short", "calibration.dataset")


def test_a_model_that_can_write_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = opened(tiny_model(tmp_path / "model"), tmp_path / "work")
    with whole_model(work.decoder()) as whole:
        monkeypatch.setattr(whole, "forward", None)
        with pytest.raises(ModelRefused, match="can't write answers: TypeError") as refusal:
            answered(whole, [[5]], OWN_SAMPLING.config(2), OWN_SAMPLING.ends)
    assert (refusal.value.code, refusal.value.param) == ("answers_unsupported", "calibration.dataset")


@pytest.mark.parametrize(
    ("memory", "fits"),
    [(DeviceMemory(10**9, 10**9 + 1000), False), (DeviceMemory(0, 10**12), True), (UNKNOWN, True)],
)
def test_a_model_without_room_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: DeviceMemory, *, fits: bool
) -> None:
    model = tiny_model(tmp_path / "model")
    monkeypatch.setattr(work_module, "device_memory", lambda _: memory)
    if fits:
        assert written(model, tmp_path / "work").tokens.shape == (4, 32)
        return
    monkeypatch.setattr(work_module, "own_answers", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(OutOfMemory, match=r"own answers need 0\.0 GB") as refusal:
        written(model, tmp_path / "work")
    assert isinstance(refusal.value, NibbleError)
    assert "name another calibration.dataset" in refusal.value.remedy
