"""How an artifact is served: `POST /v1/deployments`, its PATCH, and `deploy` in a job."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from app.core.records.forms import Form
from app.core.records.json_types import JsonTyped

Engine = Literal["auto", "transformers", "vllm"]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]

STRICT = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
MOST_REPLICAS = 16
SHARED = frozenset(
    {"dtype", "max_model_len", "max_num_seqs"}
)  # options that both engines have, as vLLM names them

DeploymentName = Annotated[
    str,
    Form(
        r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._:-]{0,95}){0,2}$",
        "a deployment's name: at most 96 letters, digits and . _ : -, the first a letter or a digit, "
        "or up to three such words with / between them",
    ),
]
Aliases = Annotated[tuple[DeploymentName, ...], Field(max_length=16)]
ReplicaCount = Annotated[int, Field(ge=1, le=MOST_REPLICAS)]
MOST_IDLE_S = 30 * 24 * 3600
IdleSeconds = Annotated[int, Field(ge=1, le=MOST_IDLE_S)]
Tokens = Annotated[int, Field(ge=1)]
Sequences = Annotated[int, Field(ge=1, le=4096)]
CacheShare = Annotated[float, Field(gt=0, le=0.95)]


class VllmOptions(JsonTyped):
    """Options that are passed to `vllm serve`; vLLM's defaults hold for absent ones."""

    model_config = STRICT

    tensor_parallel_size: int | None = Field(default=None, ge=1, le=64)
    pipeline_parallel_size: int | None = Field(default=None, ge=1, le=64)
    distributed_executor_backend: Literal["mp", "ray"] | None = None  # ray: over several hosts
    max_model_len: Tokens | None = None
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    dtype: Dtype | None = None
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    # vLLM's name of how the model writes tool calls; without it vLLM refuses requests with tools
    tool_call_parser: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_-]{0,63}$")


class ServerOptions(JsonTyped):
    """What a server is started with. A change of any of these needs new servers."""

    model_config = STRICT

    engine: Engine = "auto"
    dtype: Dtype | None = None  # of what is computed, and of the cache; None: the model's
    max_model_len: Tokens | None = None  # of a prompt and its answer; None: the model's
    max_num_seqs: Sequences | None = None  # that run at once, others wait; None: the engine's
    cache_share: CacheShare | None = None  # transformers: of the memory that is free beside the weights
    vllm: VllmOptions | None = None

    @model_validator(mode="after")
    def options_fit_engine(self) -> Self:
        if self.vllm is not None and self.engine != "vllm":
            raise ValueError('options of vllm need "engine": "vllm"')
        if self.cache_share is not None and self.engine != "transformers":
            raise ValueError(
                '`cache_share` needs "engine": "transformers"; vLLM\'s share holds the weights too, and is '
                "`gpu_memory_utilization` in `vllm`"
            )
        inner = self.vllm or VllmOptions()
        twice = [name for name in SHARED if None not in (getattr(self, name), getattr(inner, name))]
        if twice:
            raise ValueError(f"`{twice[0]}` is in `vllm` too: give it once")
        return self

    @property
    def for_vllm(self) -> VllmOptions:
        """The options of `vllm serve`."""
        shared = self.model_dump(include=set(SHARED), exclude_none=True)
        return (self.vllm or VllmOptions()).model_copy(update=shared)


class DeploymentOptions(ServerOptions):
    """Options for serving an artifact: names, engine and number of servers."""

    name: DeploymentName  # `model` of OpenAI requests
    aliases: Aliases = ()  # further names of it
    idle_timeout_s: IdleSeconds | None = None  # None: never unloaded
    replicas: ReplicaCount = 1

    @field_validator("aliases")
    @classmethod
    def aliases_differ(cls, aliases: tuple[DeploymentName, ...]) -> tuple[DeploymentName, ...]:
        if len(set(aliases)) != len(aliases):
            raise ValueError("each alias may be named once")
        return aliases

    @model_validator(mode="after")
    def aliases_are_further_names(self) -> Self:
        if self.name in self.aliases:
            raise ValueError(f"{self.name} is the deployment's name: `aliases` are further ones")
        return self

    @property
    def names(self) -> tuple[DeploymentName, ...]:
        return self.name, *self.aliases
