"""A head that is quantized like any other linear: solved, checked, judged, resumed, opened and served."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.core.errors import VerificationFailed
from app.core.records.specs import JobSpec, Recipe, SearchSpec
from tests.inference import Served, generated, greedy, prompts_of_text
from tests.integration.test_architectures import dequantized, opened
from tests.tiny_models import EngineRun, random_model, save_model, some_tokens, tiny_spec
from workers.child.candidate_files import CandidateFiles
from workers.modeling.checkpoint import Checkpoint
from workers.quantization.continuations import Continuation, likelihoods

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq", "symmetric": True},
    "awq+gptq": {"method": "awq", "rounding": "gptq"},
    "omniquant": {"method": "omniquant", "search": SearchSpec(grid_points=4, epochs=2)},
}


def recipe(ignore: tuple[str, ...] = (), **changes: Any) -> Recipe:
    return Recipe(**{"group_size": 32, "search": SearchSpec(grid_points=4), "ignore": ignore, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model("llama"), tmp_path_factory.mktemp("models") / "llama")


def head_entries(run: EngineRun, index: int = 0) -> list[Any]:
    layers = run.report.candidates[index].layers
    return [entry for layer in layers for entry in layer.linears if entry.linear == "lm_head"]


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_quantizes_the_head_and_the_report_is_of_the_files(
    tmp_path: Path, model: Path, method: str
) -> None:
    run = EngineRun(tiny_spec(recipe(**METHODS[method])), model, tmp_path / "work")
    (entry,) = head_entries(run)
    assert entry.bits == 4
    assert entry.loss < entry.energy
    assert entry.ratio is None
    tensors = load_file(run.folder("compressed-tensors") / "model.safetensors")
    assert "lm_head.weight_packed" in tensors
    assert "lm_head.weight" not in tensors
    judge = dequantized(run, tmp_path / "dequantized")
    found = perplexity(judge, run.texts().evaluation.tokens)
    assert found == pytest.approx(run.report.candidates[0].perplexity, rel=1e-5)
    assert run.report.candidates[0].bytes["compressed-tensors"] == pytest.approx(
        run.opened.plan.candidates[0].output_bytes["compressed-tensors"], rel=0.05
    )


def test_the_head_is_rounded_for_the_input_that_it_gets(tmp_path: Path, model: Path) -> None:
    """GPTQ knows the quantized chain's input of the head, so it loses less there than rounding does."""
    recipes = (recipe(method="gptq", search=SearchSpec(clip=False)),)
    run = EngineRun(tiny_spec(recipes), model, tmp_path / "work")
    (entry,) = head_entries(run)
    assert entry.loss < 0.9 * entry.loss_rounding


def test_recipes_of_a_job_differ_in_the_head(tmp_path: Path, model: Path) -> None:
    """A recipe that leaves the head as it is gets the files and figures that it gets by itself."""
    plain, taken = recipe(("lm_head",)), recipe()
    both = EngineRun(tiny_spec((plain, taken)), model, tmp_path / "both")
    alone = EngineRun(tiny_spec(plain), model, tmp_path / "alone")
    files = [run.folder("compressed-tensors") for run in (both, alone)]
    assert (files[0] / "model.safetensors").read_bytes() == (files[1] / "model.safetensors").read_bytes()
    assert (files[0] / "config.json").read_bytes() == (files[1] / "config.json").read_bytes()
    first, second = both.report.candidates
    assert first.kl == alone.report.candidates[0].kl
    assert second.kl > first.kl
    assert [len(head_entries(both, index)) for index in (0, 1)] == [0, 1]


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("left", [0, 2])
def test_a_resumed_head_has_the_same_bytes(tmp_path: Path, model: Path, method: str, left: int) -> None:
    spec = tiny_spec(recipe(**METHODS[method]))
    unbroken = EngineRun(spec, model, tmp_path / "unbroken")
    first = EngineRun(spec, model, tmp_path / "broken")
    checkpoints = first.checkpoints()
    for layer in range(left, 3):
        (checkpoints.folder / checkpoints.layer_key(0, layer)).unlink()
    again = EngineRun(spec, model, tmp_path / "broken")
    assert again.report.resumed_at_layer == left
    paths = [run.folder("compressed-tensors") / "model.safetensors" for run in (unbroken, again)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(("symmetric", "bits"), [(True, 4), (False, 4), (True, 8)])
def test_transformers_opens_a_quantized_head(tmp_path: Path, model: Path, symmetric: bool, bits: int) -> None:
    run = EngineRun(tiny_spec(recipe(symmetric=symmetric, bits=bits)), model, tmp_path / "work")
    loaded, expected = opened(run.folder("compressed-tensors")), dequantized(run, tmp_path / "plain")
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["compressed-tensors", "awq", "gptq"])
@pytest.mark.parametrize("native", [True, False])
def test_our_server_computes_with_a_quantized_head(
    tmp_path: Path,
    model: Path,
    name: Any,
    native: bool,
) -> None:
    spec = tiny_spec(recipe(symmetric=name == "gptq"), formats=(name,))
    run = EngineRun(spec, model, tmp_path / "work")
    served = Served(run.folder(name), dtype=torch.float32, native=native)
    assert served.native is native
    assert type(served.loaded.model.lm_head).__name__ == "QuantizedLinear"
    judge = dequantized(run, tmp_path / "judge", name)
    for prompt in prompts_of_text(4)[1:]:
        assert served.generate([greedy(prompt, 6)]) == [generated(judge, prompt, 6)]


def test_a_changed_byte_of_the_head_is_found(tmp_path: Path, model: Path) -> None:
    run = EngineRun(tiny_spec(recipe()), model, tmp_path / "work")
    files = CandidateFiles.of(run.opened, run.opened.plan.candidates[0], run.checkpoints())
    (folder,) = files.folders
    path = folder.folder / "model.safetensors"
    header = Checkpoint(folder.folder).tensors["lm_head.weight_packed"]
    content = bytearray(path.read_bytes())
    content[header.start] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationFailed, match="lm_head read back"):
        folder.verify(files.load_layer)


def test_tasks_are_answered_with_the_quantized_head(tmp_path: Path, model: Path) -> None:
    run = EngineRun(tiny_spec(recipe(bits=2)), model, tmp_path / "work")
    files = CandidateFiles.of(run.opened, run.opened.plan.candidates[0], run.checkpoints())
    (folder,) = files.folders
    decoder = run.opened.decoder()
    requests = [Continuation(tuple(tokens[:9]), tuple(tokens[9:])) for tokens in some_tokens(4, 12).tolist()]
    models = [decoder.layer_weights, partial(folder.read_weights, Checkpoint(folder.folder))]
    original, own = likelihoods(decoder, requests, models, 64, lambda _: None)
    for judge, answers in ((opened(model), original), (dequantized(run, tmp_path / "plain"), own)):
        for index, request in enumerate(requests):
            tokens = torch.tensor([*request.context, *request.tokens])
            with torch.no_grad():
                scores = judge(tokens[None]).logits[0, :-1].log_softmax(dim=-1)
            expected = scores.gather(1, tokens[1:, None])[-len(request.tokens) :].sum()
            assert float(answers.log_probability[index]) == pytest.approx(float(expected), rel=1e-4)


def test_a_target_search_raises_the_bits_of_the_head(tmp_path: Path, model: Path) -> None:
    asked = recipe(method="gptq", overrides=[{"match": "lm_head", "bits": 2}])
    body = {**tiny_spec(asked).model_dump(), "target": {"max_kl": 1e-9, "on_miss": "publish"}}
    run = EngineRun(JobSpec.model_validate(body), model, tmp_path / "work")
    raised = [each for one in run.report.tries for each in one.recipe.overrides if each.match == "lm_head"]
    assert max(each.bits or 0 for each in raised) > 2
    assert all(one.layers[-1].linears[-1].linear == "lm_head" for one in run.report.candidates)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32, "tie_word_embeddings": False}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_heads_of_other_architectures(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    folder = save_model(random_model(model_type, **changes), tmp_path / "model")
    run = EngineRun(tiny_spec(recipe(symmetric=True)), folder, tmp_path / "work")
    head = run.opened.plan.candidates[0].head
    assert head is not None
    tokens = some_tokens(2, 40)
    loaded, expected = opened(run.folder("compressed-tensors")), dequantized(run, tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)
    found = perplexity(expected, run.texts().evaluation.tokens)
    assert found == pytest.approx(run.report.candidates[0].perplexity, rel=1e-5)
