"""Which recipe suits a model on a device: every scheme planned from the headers, compared, or ruled out.

What is compared: whether a server has a kernel for the scheme there, whether the file leaves room for the
cache, what the numbers lose, and how fast they are. Of those that hold what was asked for, the one that
loses least is recommended; of several that lose alike, one that is faster than 16 bits, then the first of
`OPTIONS`. Ratios are not compared with each other: some are published and some are bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ByteSize, Field

from app.core.errors import InvalidRequest, ModelRefused, RecipeUnsupported
from app.core.formats.file_format import Scheme
from app.core.formats.registry import FormatName
from app.core.jobs.submission import refuse_own_storage
from app.core.planning.cache_size import CacheShape, cache_shape
from app.core.planning.family import text_settings
from app.core.planning.model_free import StreamedPlan, plan_model_free
from app.core.planning.plan import CandidatePlan, Plan, plan_job
from app.core.planning.serving_advice import Advice, advice, speeds_text
from app.core.planning.serving_devices import DEVICES, ServingDevice
from app.core.planning.serving_speed import speed_of
from app.core.records.device_names import DeviceName
from app.core.records.specs import Frozen, JobSpec, Recipe
from app.core.settings import Settings
from app.core.sources.model_headers import ModelHeaders
from app.core.sources.model_source import HubModel, open_model
from app.core.sources.quantized_model import inspect_original

FORMAT: FormatName = "compressed-tensors"  # all schemes; vLLM keeps it, awq and gptq are read through shims
USABLE = 0.92  # of a device's memory: vLLM 0.33.0's gpu_memory_utilization
USUAL_CONTEXT = 8192  # tokens, or fewer if the model has fewer positions
CACHE_BYTES = {None: 2, "fp8": 1}  # of a value in the cache
WEIGHTS_ALONE = {"nvfp4": "nvfp4a16", "mxfp4": "mxfp4a16"}  # the same weights without ranges of inputs
EXPERT = ".experts."  # in the names of linears
FP8_CACHE_FROM = 8.9  # compute capability: what has FP8

# What numbers lose, least first: of the bundled model and SmolLM2 (docs/benchmarks.md, Schemes; recipes.md).
LOSSES = (
    "eight bits: next to nothing is lost",
    "four bits for weights: little is lost",
    "four bits for weights, and inputs rounded: more is lost; look at the report",
    "three bits: try it and look at the report",
    "two bits: a last resort",
)
LAST_RESORTS = 3  # from which place on room for more sequences is not worth the loss


class Option(NamedTuple):
    """A recipe that is considered; `loss` is its place in LOSSES."""

    recipe: dict[str, Any]
    loss: int


SPREAD = {"method": "awq", "rounding": "gptq"}
OPTIONS = (
    Option({"method": "rtn", "scheme": "fp8"}, 0),
    Option({"method": "rtn", "scheme": "fp8-block"}, 0),
    Option({"method": "awq", "scheme": "w8a8"}, 0),
    Option({"method": "rtn", "scheme": "w8a16", "symmetric": True}, 0),
    Option({**SPREAD, "scheme": "w4a16"}, 1),
    Option({"method": "gptq", "scheme": "nvfp4a16"}, 1),
    Option({"method": "gptq", "scheme": "mxfp4a16"}, 1),
    Option({"method": "gptq", "scheme": "w4a8"}, 2),
    Option({"method": "gptq", "scheme": "nvfp4"}, 2),
    Option({"method": "gptq", "scheme": "mxfp4"}, 2),
    Option({**SPREAD, "scheme": "w3a16"}, 3),
    Option({**SPREAD, "scheme": "w2a16", "group_size": 64}, 4),
)


TakesCache = Callable[[], bool]


class RecommendationRequest(Frozen):
    """What `POST /v1/recommendations` takes."""

    model: str = Field(min_length=1, max_length=1024)
    gpu: DeviceName
    memory: Annotated[ByteSize, Field(gt=0)] | None = None  # bytes or text such as 24GB; None: the device's
    sequences: int = Field(default=16, ge=1, le=4096)  # at a time
    context: int | None = Field(default=None, ge=1, le=10_000_000)  # tokens of each; None: 8192 at most


class ServedRecipe(Frozen):
    """A recipe that can be served there."""

    scheme: str
    recipe: Recipe
    evaluated: bool  # false: a job without an evaluation, as nothing else is possible for this model
    format: FormatName
    bits_per_weight: float
    output_bytes: int
    room_bytes: int  # for the cache, and what the server itself needs
    cache_tokens: int | None  # of all sequences together; None where the cache's size is not known
    cache_sequences: int | None  # of `context` tokens each
    advice: Advice
    why: str


class RuledOut(Frozen):
    """A recipe that can't be served there, and why."""

    scheme: str
    output_bytes: int | None  # None: the model can't have it
    why: str


class Recommendation(Frozen):
    """The answer: what to quantize to, what else would do, what would not."""

    object: Literal["recommendation"] = "recommendation"
    model: str
    architecture: str
    device: DeviceName
    device_title: str
    memory_bytes: int
    usable_bytes: int
    sequences: int
    context: int
    original_bytes: int
    original_fits: bool  # with a sequence of `context` tokens
    cache_bytes_per_token: int | None  # of a long sequence, 16-bit keys and values
    recommended: ServedRecipe | None  # None: nothing fits
    alternatives: tuple[ServedRecipe, ...]  # best first
    ruled_out: tuple[RuledOut, ...]
    notes: tuple[str, ...]


class Serving(NamedTuple):
    """What the model shall be served with."""

    device: ServingDevice
    memory: int
    sequences: int
    context: int

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)


class Planned(NamedTuple):
    """An option on this model."""

    option: Option
    plan: Plan | StreamedPlan
    evaluated: bool

    @property
    def candidate(self) -> CandidatePlan:
        return self.plan.candidates[0]

    @property
    def scheme(self) -> Scheme:
        return self.candidate.modules.common


def recommend_for(request: RecommendationRequest, settings: Settings) -> Recommendation:
    """Look at the model's headers and compare all options. Raises as `recommend` and `open_model` do."""
    refuse_own_storage(request.model, settings, param="model")
    files = open_model(request.model, **settings.source_access)
    name = files.name if isinstance(files, HubModel) else request.model
    return recommend(request, name, inspect_original(files))


def recommend(request: RecommendationRequest, model: str, headers: ModelHeaders) -> Recommendation:
    """Compare all options for the model with these headers.

    Raises InvalidRequest for a device without a size of memory, ModelRefused for a model that can't be
    quantized.
    """
    serving = serving_of(request, headers.config)
    planned: list[Planned] = []
    ruled_out: list[RuledOut] = []
    for option in OPTIONS:
        try:
            planned.append(planned_option(option, headers))
        except RecipeUnsupported as refusal:
            why = f"{refusal.message}; {refusal.remedy}"
            ruled_out.append(RuledOut(scheme=option.recipe["scheme"], output_bytes=None, why=why))
    if not planned:
        raise ModelRefused(
            f"no scheme fits the model's linears; the first refusal: {ruled_out[0].why}",
            code="nothing_to_quantize", remedy="submit a job with `indivisible` skip", param="model",
        )  # fmt: skip
    plan = planned[0].plan
    shape = cache_shape(planned[0].candidate.linears, text_settings(headers.config))
    takes_cache = cache(partial(takes_fp8_cache, headers))  # planned once, where it is asked for
    choices: list[tuple[tuple[object, ...], ServedRecipe]] = []
    for one in planned:
        choice = considered(one, serving, shape, takes_cache)
        if isinstance(choice, RuledOut):
            ruled_out.append(choice)
        else:
            choices.append((rank(one, choice, serving), choice))
    ordered = [choice for _, choice in sorted(choices, key=lambda ranked: ranked[0])]
    return Recommendation(
        model=model,
        architecture=plan.model_type,
        device=request.gpu,
        device_title=serving.device.title,
        memory_bytes=serving.memory,
        usable_bytes=serving.usable,
        sequences=serving.sequences,
        context=serving.context,
        original_bytes=plan.model_bytes,
        original_fits=plan.model_bytes + cache_need(shape, 1, serving.context) <= serving.usable,
        cache_bytes_per_token=None if shape is None else shape.whole * CACHE_BYTES[None],
        recommended=ordered[0] if ordered else None,
        alternatives=tuple(ordered[1:]),
        ruled_out=tuple(ruled_out),
        notes=(*headers.notes, *notes(serving, shape, planned, bool(ordered))),
    )


def serving_of(request: RecommendationRequest, config: dict[str, Any]) -> Serving:
    """What the request leaves open, filled in."""
    device = DEVICES[request.gpu]
    memory = request.memory or device.memory
    if memory is None:
        raise InvalidRequest(
            f"how much memory a {device.title} has is not known", code="memory_unknown",
            remedy="name it, as in 64GB", param="memory",
        )  # fmt: skip
    positions = text_settings(config).get("max_position_embeddings")
    longest = positions if isinstance(positions, int) and positions > 0 else USUAL_CONTEXT
    context = request.context or min(USUAL_CONTEXT, longest)
    return Serving(device, int(memory), request.sequences, context)


def planned_option(option: Option, headers: ModelHeaders) -> Planned:
    """Its plan; of a model without a definition that of a job without an evaluation, if that will do."""
    body: dict[str, Any] = {"model": "-", "recipe": option.recipe, "formats": [FORMAT]}
    try:
        plan = plan_job(JobSpec.model_validate(body), headers.config, headers.tensors)
        return Planned(option, plan, evaluated=True)
    except ModelRefused as refusal:
        rounded = {key: value for key, value in option.recipe.items() if key != "rounding"}
        spec = JobSpec.model_validate({**body, "recipe": {**rounded, "method": "rtn"}})
        reason = spec.recipes[0].needs_text
        if reason is not None:
            raise RecipeUnsupported(f"{refusal.message}; {reason}", param="model") from refusal
        spec = spec.model_copy(update={"evaluation": None})
        return Planned(option, plan_model_free(spec, headers.config, headers.tensors), evaluated=False)


def considered(
    one: Planned, serving: Serving, shape: CacheShape | None, takes_cache: TakesCache
) -> ServedRecipe | RuledOut:
    """What it gives on the device, or why it can't be served there."""
    candidate, scheme = one.candidate, one.scheme
    size = candidate.output_bytes[FORMAT]
    own = advice(scheme, candidate.bits_per_weight, serving.device)
    room = serving.usable - size
    if own.use in ("none", "emulated", "not read"):
        servers = ", ".join(f"{each.server}: {each.use}" for each in own.kernels)
        why = f"no server is known to have a kernel on {serving.device.title} ({servers})"
        return RuledOut(scheme=own.scheme, output_bytes=size, why=why)
    if own.use == "weights" and own.scheme in WEIGHTS_ALONE:
        why = f"servers read its weights alone there, as those of {WEIGHTS_ALONE[own.scheme]}"
        return RuledOut(scheme=own.scheme, output_bytes=size, why=why)
    need = cache_need(shape, 1, serving.context)
    if room < need:
        why = (
            f"{gigabytes(size)} and {gigabytes(need)} for a sequence of {serving.context} tokens exceed "
            f"the {gigabytes(serving.usable)} that may be used"
        )
        return RuledOut(scheme=own.scheme, output_bytes=size, why=why)
    recipe = with_small_cache(one, serving, shape, takes_cache)
    value_bytes = CACHE_BYTES[recipe.kv_cache]
    of_one = None if shape is None else shape.values(serving.context) * value_bytes
    held = room // of_one if of_one else None
    return ServedRecipe(
        scheme=own.scheme,
        recipe=recipe,
        evaluated=one.evaluated,
        format=FORMAT,
        bits_per_weight=candidate.bits_per_weight,
        output_bytes=size,
        room_bytes=room,
        cache_tokens=tokens_in(room, value_bytes, shape, serving.context),
        cache_sequences=held,
        advice=own,
        why=reason(one, own, held, serving),
    )


def with_small_cache(
    one: Planned, serving: Serving, shape: CacheShape | None, takes_cache: TakesCache
) -> Recipe:
    """The recipe, with a cache in FP8 where only that holds all sequences that are asked for."""
    recipe, room = one.candidate.recipe, serving.usable - one.candidate.output_bytes[FORMAT]
    need = cache_need(shape, serving.sequences, serving.context)
    able = serving.device.capability >= FP8_CACHE_FROM and one.evaluated
    if not able or room >= need or room < need // 2:
        return recipe
    return recipe.model_copy(update={"kv_cache": "fp8"}) if takes_cache() else recipe


def takes_fp8_cache(headers: ModelHeaders) -> bool:
    """Whether the model's layers cache keys and values that can have scales."""
    option = Option({**OPTIONS[0].recipe, "kv_cache": "fp8"}, OPTIONS[0].loss)
    try:
        return planned_option(option, headers).evaluated
    except RecipeUnsupported:
        return False


def cache_need(shape: CacheShape | None, sequences: int, context: int) -> int:
    """Bytes of 16-bit keys and values; 0 where the cache's size is not known."""
    return 0 if shape is None else sequences * shape.values(context) * CACHE_BYTES[None]


def tokens_in(room: int, value_bytes: int, shape: CacheShape | None, context: int) -> int | None:
    """Tokens of sequences of `context` tokens, all together."""
    if shape is None:
        return None
    return room * context // (shape.values(context) * value_bytes)


def rank(one: Planned, choice: ServedRecipe, serving: Serving) -> tuple[object, ...]:
    """Smaller is better: four bits or more, room for what was asked, then the loss, the speed, the order."""
    short = choice.cache_sequences is not None and choice.cache_sequences < serving.sequences
    speed = speed_of(one.scheme, choice.bits_per_weight, choice.advice.use, serving.device, serving.sequences)
    gain = 1 if speed is None else {"faster": 0, "slower": 2}.get(speed.verdict, 1)
    return one.option.loss >= LAST_RESORTS, short, one.option.loss, gain, OPTIONS.index(one.option)


def reason(one: Planned, own: Advice, held: int | None, serving: Serving) -> str:
    """Why it stands where it stands."""
    room = ""
    if held is not None:
        enough = "" if held >= serving.sequences else f", fewer than the {serving.sequences} asked for"
        room = f"; room for {held} sequences of {serving.context} tokens{enough}"
    return f"{LOSSES[one.option.loss]}{room}; {speeds_text(own.speeds, own.use)}"


def notes(serving: Serving, shape: CacheShape | None, planned: list[Planned], fits: bool) -> Iterator[str]:
    """What the figures leave out."""
    yield (
        f"{USABLE:.0%} of the memory may be used, vLLM 0.33.0's default; activations and graphs of the "
        "server take a share of the room that is named for the cache"
    )
    if shape is None:
        yield "how large the cache is can't be seen from the names of the linears"
    elif shape.stateful:
        yield f"{shape.stateful} layers hold a state of fixed size per sequence, which is not counted"
    if any(EXPERT in linear.name for linear in planned[0].candidate.linears):
        yield "kernels were read for linears of dense models: experts have kernels of their own"
    if not planned[0].evaluated:
        yield "no definition of the model is known, so its weights are rounded without calibration"
    if not fits:
        smallest = min(planned, key=lambda one: one.candidate.output_bytes[FORMAT])
        size = smallest.candidate.output_bytes[FORMAT]
        yield (
            f"nothing fits: the smallest file is {smallest.option.recipe['scheme']} with {gigabytes(size)}, "
            "so take more memory, or several devices"
        )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
