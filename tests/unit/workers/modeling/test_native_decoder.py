"""The native call against transformers' own forward pass: every family, every way through the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.cpu.whole_decoder import NativeDecoder, decoder_library
from tests.tiny_models import random_model
from tests.unit.kernels.weights import random_weight
from workers.modeling.native_decoder import native_decoder
from workers.modeling.quantized_linear import quantized_linear
from workers.serving.batch import Batch, Prefill
from workers.serving.detokenizer import Detokenizer
from workers.serving.requests import Choice, Generation, Sampling, Sequence, StopRules

CPU = torch.device("cpu")
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped heads": ("llama", {"num_key_value_heads": 4}),
    "llama with scaled positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "wide heads": ("llama", {"head_dim": 80}),
    "a tied head": ("llama", {"tie_word_embeddings": True}),
    "an odd vocabulary": ("llama", {"vocab_size": 4099}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": (
        "qwen2",
        {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
            "use_sliding_window": True,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
}  # fmt: skip


class NoText:
    def decode(self, ids: object, skip_special_tokens: bool = True) -> str:
        return ""


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    """As in the engine's thread."""
    library = decoder_library()
    if isinstance(library, str):
        pytest.skip(library)
    with torch.inference_mode():
        yield


def quantized(
    model_type: str,
    dtype: torch.dtype = torch.float32,
    bits: int = 4,
    backend: str = "vector",
    **changes: object,
) -> PreTrainedModel:
    """A tiny model whose linears, but for the head, are packed."""
    model = random_model(model_type, dtype, **changes).requires_grad_(requires_grad=False)
    for name, linear in [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    ]:
        weight = random_weight(
            linear.out_features, linear.in_features, bits=bits, group_size=32, asymmetric=bits == 4
        )
        module = quantized_linear(weight, dtype=dtype, device=CPU, bias=linear.bias, requested=backend)
        model.set_submodule(name, module)
    return model


def decoder_of(model: PreTrainedModel) -> NativeDecoder:
    decoder = native_decoder(model, 128)
    assert isinstance(decoder, NativeDecoder), decoder
    return decoder


def sequence(length: int, seed: int) -> Sequence:
    tokens = torch.randint(0, 4096, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    generation = Generation("r", tuple(tokens), Sampling(), StopRules(max_tokens=99), deliver=lambda _: None)
    return Sequence(generation, 0, Detokenizer(NoText()))


class Runner:
    """A batch whose sequences get fixed tokens: its logits depend on no rounding of earlier ones."""

    def __init__(self, model: PreTrainedModel, *, native: bool) -> None:
        self.batch = Batch(model, 4096, decoder_of(model) if native else None)

    def start(self, sequence: Sequence, step: int = 512) -> Tensor:
        prefill, logits = Prefill([sequence]), None
        while logits is None:
            logits = self.batch.read(prefill, step)
        self.batch.join(prefill)
        return logits

    def advance(self) -> Tensor:
        for number, each in enumerate(self.batch.sequences):
            each.add(Choice((each.tokens[-1] * 31 + len(each.tokens) + number) % 4096))
        return self.batch.advance()


def story(model: PreTrainedModel, lengths: list[int], *, native: bool, step: int = 512) -> Iterator[Tensor]:
    """Logits of prompts, of steps together, and of steps after the first sequence has left."""
    runner = Runner(model, native=native)
    for seed, length in enumerate(lengths):
        yield runner.start(sequence(length, seed), step)
        yield runner.advance()
    for _ in range(3):
        yield runner.advance()
    runner.batch.leave(0)
    if runner.batch.sequences:
        yield runner.advance()
        yield runner.start(sequence(5, 99), step)
        yield runner.advance()


def assert_alike(model: PreTrainedModel, lengths: list[int], tolerance: float, step: int = 512) -> None:
    theirs = list(story(model, lengths, native=False))
    ours = list(story(model, lengths, native=True, step=step))
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert (own - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape: str) -> None:
    model_type, changes = SHAPES[shape]
    assert_alike(quantized(model_type, **changes), [3, 21, 12], 2e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [[1], [40], [7, 30], [3, 9, 27, 4, 16, 1, 8, 33]])
@pytest.mark.parametrize("step", [512, 5])
def test_any_number_of_sequences_and_prompts_in_pieces(lengths: list[int], step: int) -> None:
    assert_alike(quantized("llama"), lengths, 2e-5, step)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(bits: int) -> None:
    assert_alike(quantized("llama", bits=bits), [9, 4], 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_other_dtypes_differ_by_their_rounding(dtype: torch.dtype, tolerance: float) -> None:
    assert_alike(quantized("qwen3", dtype, head_dim=32), [9, 20], tolerance)


def test_a_model_that_is_not_quantized() -> None:
    assert_alike(random_model("llama"), [9, 4], 2e-5)


def test_a_row_gives_the_same_alone_and_with_others() -> None:
    model, alone = quantized("llama"), []
    lengths = [3, 9, 27, 4, 16, 1, 8, 33]
    for seed, length in enumerate(lengths):
        runner = Runner(model, native=True)
        runner.start(sequence(length, seed), 4)
        runner.batch.sequences[0].add(Choice(77))
        alone.append(runner.batch.advance())
    together = Runner(model, native=True)
    for seed, length in enumerate(lengths):
        together.start(sequence(length, seed))
    for each in together.batch.sequences:
        each.add(Choice(77))
    assert torch.equal(together.batch.advance(), torch.cat(alone))


def test_threads_change_nothing() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.cat(list(story(quantized("llama"), [5, 17], native=True))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_weight_that_is_not_a_number_shows() -> None:
    model = quantized("llama")
    model.model.embed_tokens.weight.data[5] = torch.nan
    runner = Runner(model, native=True)
    runner.start(sequence(4, 1))
    runner.batch.sequences[0].add(Choice(5))
    assert torch.isnan(runner.batch.advance()).all()


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("phi3", {}, "Phi3ForCausalLM is not one of LlamaForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "the activation is gelu, not silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "rotary positions of type 'dynamic'",
        ),
        ("llama", {"head_dim": 24}, "heads of 24; there are loops for 16"),
        ("llama", {"intermediate_size": 144}, "144 channels are no multiple of 32"),
    ],
)
def test_other_shapes_are_refused_by_name(model_type: str, changes: dict[str, object], message: str) -> None:
    assert message in str(native_decoder(random_model(model_type, **changes), 64))  # type: ignore[arg-type]


def test_weights_of_another_backend_are_refused() -> None:
    model = quantized("llama", backend="torch")
    assert native_decoder(model, 64) == "it does not read the weights of the backend torch"
