"""llama.cpp opens our GGUF files: the same tokens, and the model that the report measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

from app.core.records.specs import Recipe
from tests.tiny_models import TEXTS, TOKENIZER, EngineRun, random_model, save_model, tiny_spec
from workers.formats.folders import folder_class

QUESTIONS = (
    "The king said: 'tis 1984!\n\n  And so  on. I'VE we'll 12345 naïve café 😀 tab\t\there   end ",
    "<|im_start|>user\nhi<|im_end|>\n",
    " leading; 3.14159 == x_1; fn(){}\r\n\r\nЖёлтый дом 中文字符 한국어 CamelCase HTMLParser's",
    "",
)
READ = 24  # tokens
TOLERANCE = 0.01  # of the mean log-probability, nats: llama.cpp rounds activations to 8 bits in groups of 32
EACH = 0.12  # of one token's
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama q4_0": ("llama", {"head_dim": 32}, {"symmetric": True}),
    "llama q8_0": ("llama", {"tie_word_embeddings": True}, {"bits": 8, "symmetric": True}),
    "llama head": ("llama", {}, {"ignore": ()}),
    "llama 3 scaling": ("llama", {"rope_parameters": LLAMA3}, {}),
    "llama linear": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}, {}
    ),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "olmo2": ("olmo2", {}, {}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
        {},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": False}, {}),
}  # fmt: skip
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(name: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"), BYTES])


RULES: dict[str, tuple[Any, bool]] = {
    "gpt-2": (GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False),
    "qwen2": (split("qwen2"), False),
    "dbrx": (split("dbrx"), False),
    "gpt-4o": (split("gpt-4o"), False),
    "llama-bpe": (split("llama-bpe"), True),
    "tekken": (split("tekken"), True),
}


def said_of(environment: Path, file: Path, questions: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "questions.json").write_text(json.dumps(questions))
    python, probe = environment / "bin" / "python", Path(__file__).with_name("llama_cpp_files_probe.py")
    done = subprocess.run(
        [python, "-P", probe, file, folder / "questions.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def as_written(run: EngineRun, model: PreTrainedModel) -> PreTrainedModel:
    """`model` with what the file holds, as it was evaluated."""
    plan = run.opened.plan
    written = folder_class("gguf")(
        run.folder("gguf"), "gguf", run.opened.checkpoint, plan, plan.candidates[0]
    )
    stored, state = written.reader(), model.state_dict()
    for layer in range(plan.steps):
        for name, value in written.read_weights(stored, layer).items():
            state[written.prefixes[layer] + name].copy_(value)
    return model


def expected(model: PreTrainedModel, tokens: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    of_next = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens)[1:, None])
    values: list[float] = of_next[:, 0].tolist()
    return values


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_was_evaluated(
    llama_cpp_environment: Path, tmp_path: Path, name: str
) -> None:
    model_type, config, recipe = MODELS[name]
    model = save_model(random_model(model_type, **config), tmp_path / "model")
    run = EngineRun(tiny_spec(Recipe(**recipe), formats=("gguf",)), model, tmp_path / "work")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(QUESTIONS[0])["input_ids"][:READ]
    file = run.folder("gguf") / "model.gguf"
    said = said_of(llama_cpp_environment, file, {"texts": QUESTIONS, "tokens": tokens}, tmp_path)
    assert said["ids"] == [tokenizer(text)["input_ids"] for text in QUESTIONS]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    right = expected(as_written(run, loaded), tokens)
    assert said["log_probabilities"] == pytest.approx(right, rel=0.01, abs=EACH)
    assert mean(said["log_probabilities"]) == pytest.approx(mean(right), rel=1e-3, abs=TOLERANCE)


@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_splits_text_by_the_name_that_the_file_has(
    llama_cpp_environment: Path, tmp_path: Path, name: str
) -> None:
    """A vocabulary trained under the rules of each name, with a token before every text."""
    rules, whole = RULES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = rules, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(
        [*QUESTIONS * 3, (TEXTS / "valid.txt").read_text("utf-8")[:300_000]], trainer
    )
    tokenizer.add_tokens(["<think>"])
    model = save_model(random_model("llama"), tmp_path / "model")
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|endoftext|>", add_bos_token=True
    )
    (model / "chat_template.jinja").unlink()
    made.save_pretrained(model)
    run = EngineRun(tiny_spec(Recipe(method="rtn"), formats=("gguf",)), model, tmp_path / "work")
    file = run.folder("gguf") / "model.gguf"
    assert GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    texts = [*QUESTIONS, "so <think> it", (TEXTS / "test.txt").read_text("utf-8")[:5000]]
    said = said_of(llama_cpp_environment, file, {"texts": texts, "tokens": []}, tmp_path)
    own = AutoTokenizer.from_pretrained(model)
    for text, ids in zip(texts, said["ids"], strict=True):
        assert ids == own(text)["input_ids"], text


def test_the_report_of_a_trained_model_is_what_llama_cpp_computes(
    llama_cpp_environment: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(TOKENIZER, tmp_path / "model")
    spec = tiny_spec(Recipe(rounding="gptq"), formats=("gguf",))
    run = EngineRun(spec, model, tmp_path / "work")
    tokens = run.texts().evaluation.tokens[0].tolist()
    file = run.folder("gguf") / "model.gguf"
    said = said_of(llama_cpp_environment, file, {"texts": QUESTIONS, "tokens": tokens}, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert mean(said["log_probabilities"]) == pytest.approx(
        mean(expected(as_written(run, loaded), tokens)), abs=TOLERANCE
    )
    assert said["answer"].strip()
