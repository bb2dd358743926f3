"""An engine in the test's own process, and requests for it."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from app.core.formats.file_format import Scheme
from app.core.formats.registry import FORMATS, FormatName
from kernels import reference
from kernels.cpu.whole_decoder import NativeDecoder
from tests.tiny_models import TEXTS, TOKENIZER
from workers.formats.packings import packing_of
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.native_decoder import native_decoder
from workers.serving.batch import Batch
from workers.serving.engine import Engine, EngineLimits
from workers.serving.loading import LoadRequest, load_model
from workers.serving.requests import Generation, Sampling, StopRules, TextDelta
from workers.serving.routes import create_app
from workers.serving.served_model import ServedModel
from workers.serving.server_metrics import ServerMetrics
from workers.serving.slot_batch import SlotBatch
from workers.serving.slot_cache import SlotLimits
from workers.serving.step_attention import use_step_attention
from workers.serving.steps import StepRunner
from workers.serving.tokenization import Tokenization

LIMITS = {
    "max_model_len": 256, "max_sequences": 32, "max_waiting": 64, "max_cells": 8192, "prefill_tokens": 512
}  # fmt: skip


class Served:
    """A loaded artifact behind a running engine."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        native: bool = True,
        slots: StepRunner | None = None,
        device: str = "cpu",
        **limits: int,
    ) -> None:
        """`slots`: the batch of GPUs, whose steps this runs; the narrowest has 32 columns."""
        self.loaded = load_model(LoadRequest(folder, torch.device(device), dtype))
        self.limits = EngineLimits(**{**LIMITS, **limits})
        self.tokenization = Tokenization(folder, self.loaded.model.config.get_text_config().vocab_size)
        self.metrics = ServerMetrics("tiny")
        model = self.loaded.model
        decoder = native_decoder(model, self.limits.max_model_len) if native and slots is None else None
        self.native = isinstance(decoder, NativeDecoder)
        if slots is None:
            batch = Batch(
                model, self.limits.max_cells, decoder if isinstance(decoder, NativeDecoder) else None
            )
        else:
            bounds = self.limits
            memory = SlotLimits(
                bounds.max_sequences, bounds.max_cells, bounds.max_model_len, first_columns=32
            )
            use_step_attention(model, "grouped")
            batch = SlotBatch(model, memory, slots)
        self.engine = Engine(
            batch, self.tokenization, self.limits, self.metrics, self.tokenization.end_tokens
        )
        self.served = ServedModel("tiny", self.engine, self.tokenization, self.metrics)
        self.engine.start()

    def answers(self, requests: list[dict[str, Any]]) -> list[list[TextDelta]]:
        """All deltas of each request; the requests start at the same step."""
        found: list[list[TextDelta]] = [[] for _ in requests]
        left = [request.get("n", 1) for request in requests]
        ended = threading.Event()

        def deliver(number: int, piece: TextDelta) -> None:
            found[number].append(piece)
            left[number] -= piece.finish_reason is not None
            if not any(left):
                ended.set()

        generations = [
            Generation(id=f"r{number}", deliver=lambda piece, n=number: deliver(n, piece), **request)
            for number, request in enumerate(requests)
        ]
        with self.engine._arrived:  # the engine looks when all are there
            for generation in generations:
                self.engine.submit(generation)
        assert ended.wait(60)
        return found

    def generate(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        """The tokens of each request."""
        return [
            [choice.token for piece in pieces for choice in piece.choices]
            for pieces in self.answers(requests)
        ]

    @property
    def preemptions(self) -> float:
        value = self.metrics.registry.get_sample_value(
            "vllm:num_preemptions_total", {"model_name": "tiny", "engine": "0"}
        )
        assert value is not None
        return value

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """What the server's routes answer."""

        async def run() -> httpx.Response:
            self.served.bind(asyncio.get_running_loop())
            transport = httpx.ASGITransport(create_app(self.served))
            async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
                return await client.post(path, json=body)

        return asyncio.run(run())


def greedy(prompt: list[int], max_tokens: int, **stopping: Any) -> dict[str, Any]:
    return {
        "prompt": tuple(prompt),
        "sampling": Sampling(temperature=0),
        "stopping": StopRules(max_tokens, ignore_eos=True, **stopping),
    }


def sampled(prompt: list[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
    return greedy(prompt, max_tokens) | {"sampling": Sampling(**sampling)}


def prompts_of_text(count: int) -> list[list[int]]:
    """Prompts of many lengths, from 1 token on."""
    tokens = (
        Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        .encode((TEXTS / "test.txt").read_text("utf-8")[:20000])
        .ids
    )
    return [tokens[97 * place : 97 * place + 1 + 7 * place] for place in range(count)]


def dequantized(folder: Path, format_name: FormatName, target: Path) -> PreTrainedModel:
    """An artifact of 4 bits in groups of 32, as a plain model in float32 that transformers reads itself."""
    checkpoint, suffixes = Checkpoint(folder), FORMATS[format_name].suffixes
    entry = checkpoint.config["quantization_config"]
    scheme = Scheme(bits=4, group_size=32, symmetric=format_name != "awq")
    tensors: dict[str, torch.Tensor] = {}
    quantized = {name.removesuffix(f".{suffixes[0]}") for name in checkpoint.tensors}
    for name in checkpoint.tensors:
        linear, _, suffix = name.rpartition(".")
        if suffix == suffixes[0]:
            names = {each: f"{linear}.{each}" for each in suffixes}
            parts = {each: checkpoint.tensor(n) for each, n in names.items() if n in checkpoint.tensors}
            tensors[f"{linear}.weight"] = reference.dequantize(
                packing_of(format_name).unpack_linear(parts, entry, scheme)
            ).float()
        elif linear not in quantized or suffix not in suffixes:
            tensors[name] = checkpoint.tensor(name).float()
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return model.eval()


def generated(judge: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens by transformers' own `generate`."""
    tokens = torch.tensor([prompt])
    judge.generation_config.eos_token_id = None  # the requests ignore it, too
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    found = judge.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer
