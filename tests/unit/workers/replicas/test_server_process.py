"""The command lines of servers: one set of options in each engine's words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from app.core.records.serving_options import ServerOptions, VllmOptions
from workers.replicas.server_process import own_arguments, vllm_arguments
from workers.serving.__main__ import parse_arguments

SHARED = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 8}


def test_our_own_server_understands_what_it_is_started_with() -> None:
    words = own_arguments(ServerOptions(engine="transformers", cache_share=0.5, **SHARED))
    parsed = parse_arguments(["--artifact", "x", "--name", "n", *words])
    assert (parsed.dtype, parsed.max_model_len, parsed.max_sequences) == ("bfloat16", 512, 8)
    assert parsed.cache_share == 0.5
    assert own_arguments(ServerOptions()) == []


def test_vllm_gets_shared_options_beside_its_own() -> None:
    options = ServerOptions(engine="vllm", vllm=VllmOptions(enforce_eager=True), **SHARED)
    words = " ".join(vllm_arguments(options.for_vllm))
    for flag in ("--dtype bfloat16", "--max-model-len 512", "--max-num-seqs 8", "--enforce-eager"):
        assert flag in words
    assert vllm_arguments(ServerOptions().for_vllm) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "auto", "cache_share": 0.5}, "gpu_memory_utilization"),
        ({"engine": "vllm", "cache_share": 0.5}, "gpu_memory_utilization"),
        ({"engine": "transformers", "vllm": {}}, 'need "engine": "vllm"'),
        ({"engine": "vllm", "max_model_len": 5, "vllm": {"max_model_len": 5}}, "is in `vllm` too"),
    ],
)
def test_what_an_engine_can_not_take_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServerOptions.model_validate(options)
