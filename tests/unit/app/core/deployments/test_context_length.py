from __future__ import annotations

from typing import Any

import pytest

from app.core.deployments.context_length import check_length, longest_context, widest_context
from app.core.errors import InvalidRequest
from app.core.records.serving_options import Engine, ServerOptions, VllmOptions

PLAIN = {"max_position_embeddings": 4096}
SCALED = {**PLAIN, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
YARN = {
    **PLAIN,
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096},
}
LLAMA3 = {**PLAIN, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
LONGER = {**PLAIN, "model_max_length": 8192}
WRAPPED = {"text_config": PLAIN}
UNBOUNDED: dict[str, Any] = {"model_type": "mamba"}
# What no configuration of a model says, but what anybody may write into one.
NO_NUMBERS: list[Any] = ["long", "4096", [4096], {}, True, -1, 0, 10**400, float("inf"), float("nan")]


@pytest.mark.parametrize(
    ("config", "engine", "most"),
    [
        (PLAIN, "transformers", 4096), (PLAIN, "vllm", 4096), (PLAIN, "auto", 4096),
        (SCALED, "transformers", 4096), (SCALED, "vllm", 16384), (SCALED, "auto", 16384),
        (YARN, "vllm", 8192), (LLAMA3, "vllm", 4096), (LONGER, "vllm", 8192), (WRAPPED, "vllm", 4096),
        (UNBOUNDED, "transformers", 2048), (UNBOUNDED, "vllm", None), (UNBOUNDED, "auto", None),
    ],
)  # fmt: skip
def test_no_more_tokens_than_the_engine_reads(
    config: dict[str, Any], engine: Engine, most: int | None
) -> None:
    check_length(config, ServerOptions(engine=engine), engine)
    check_length(config, ServerOptions(engine=engine, max_model_len=most or 10**9), engine)
    if most is not None:
        with pytest.raises(InvalidRequest, match=f"{most + 1}; the model reads {most} tokens") as refusal:
            check_length(config, ServerOptions(engine=engine, max_model_len=most + 1), engine)
        assert refusal.value.param == "max_model_len"


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_length_that_is_no_number_counts_as_absent(value: Any) -> None:
    assert longest_context({"max_position_embeddings": value}) == 2048
    assert widest_context({"max_position_embeddings": value}) is None
    assert widest_context({**PLAIN, "rope_scaling": {"rope_type": "linear", "factor": value}}) == 4096
    assert widest_context({**PLAIN, "model_max_length": value}) == 4096


def test_the_options_of_vllm_count_too() -> None:
    options = ServerOptions(engine="vllm", vllm=VllmOptions(max_model_len=4097))
    with pytest.raises(InvalidRequest) as refusal:
        check_length(PLAIN, options, "vllm", section="deploy.")
    assert (refusal.value.code, refusal.value.param) == (
        "max_model_len_too_large",
        "deploy.vllm.max_model_len",
    )
