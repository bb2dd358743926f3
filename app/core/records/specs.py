"""The body of a job as callers send it, frozen and checked.

Only `model` is required. Unknown fields are refused. Whether a model can hold the recipe is decided in
`app.core.planning.plan`, which needs the model's headers.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.core.errors import field_path
from app.core.formats.file_format import Scheme
from app.core.formats.registry import FormatName
from app.core.formats.schemes import SCHEMES, CacheName, SchemeKind, SchemeName
from app.core.records.device_names import DeviceName
from app.core.records.forms import Form
from app.core.records.json_types import JsonTyped
from app.core.records.patterns import check_pattern
from app.core.records.serving_options import DeploymentOptions

log = logging.getLogger(__name__)

Method = Literal["rtn", "awq", "gptq", "omniquant"]
Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[16, 32, 64, 128, -1]
WEIGHTS_ALONE = re.compile(r"w([2348])a16")  # another way to write the scheme wna16 with that many bits
# Schemes of the same weights that need no range of the inputs.
RANGELESS = {"w8a8-static": "w8a8", "fp8-static": "fp8", "nvfp4": "nvfp4a16"}
TemplateUse = Literal["auto", "never", "always"]
OWN_ANSWERS = "self"  # the dataset that the model itself writes

LabelKey = Annotated[
    str,
    Form(
        r"^[a-z0-9][a-z0-9._/-]{0,62}$",
        "a label's key: at most 63 lower-case letters, digits and . _ / -, the first a letter or a digit",
    ),
]
LabelValue = Annotated[str, StringConstraints(max_length=128)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]
BUNDLED_TASKS = ("builtin:continuation", "builtin:agreement")
TaskName = Annotated[
    str,
    Form(
        rf"^({'|'.join(BUNDLED_TASKS)}|[A-Za-z0-9][A-Za-z0-9_.()+-]{{0,127}})$",
        f"a task: {', '.join(BUNDLED_TASKS)}, or the name of one of lm-eval's",
    ),
]


class Frozen(JsonTyped):
    """Base of all wire records: immutable, and unknown fields and other types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Kept(BaseModel):
    """Base of stored records, which another version may read: unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @classmethod
    def of_record(cls, record: bytes) -> Self | None:
        """The parsed record; None, with a log line, if only another version can read it."""
        try:
            return cls.model_validate_json(record)
        except ValidationError as fault:
            where = field_path(fault.errors()[0]["loc"])
            log.warning("a %s is left to another version of the service: %s", cls.__name__, where)
            return None


class SearchSpec(Frozen):
    """Options of the search for scales and clip bounds by AWQ and OmniQuant."""

    strategy: Literal["grid", "evolutionary"] = "grid"
    grid_points: int = Field(default=20, ge=2, le=200)
    duo_scaling: Literal["both"] | bool = "both"
    clip: bool = True
    epochs: int = Field(default=12, ge=1, le=200)  # of OmniQuant
    budget: int = Field(default=96, ge=12, le=10000)  # evaluations of the evolutionary search, per group
    seed: int = Field(default=0, ge=0, le=2**32 - 1)  # of the evolutionary search


def with_scheme_values(body: dict[str, object]) -> dict[str, object]:
    """The body with the bits, the group size and the symmetry that its `scheme` fixes.

    Raises ValueError for other values beside such a scheme.
    """
    name, kind = body.get("scheme"), None
    written = WEIGHTS_ALONE.fullmatch(name) if isinstance(name, str) else None
    if written is not None:
        kind = SchemeKind(int(written[1]), None, None)
        body = {**body, "scheme": "wna16"}
    else:
        kind = next((each for key, each in SCHEMES.items() if key == name), None)
    for field in ("bits", "group_size", "symmetric"):
        fixed = None if kind is None else getattr(kind, field)
        if fixed is None:
            continue
        if body.get(field, fixed) not in (fixed, None, "auto"):
            raise ValueError(f"scheme {name} has {field} {json_value(fixed)}: leave `{field}` out")
        if field != "symmetric" or "match" not in body:  # an override has no such field
            body = {**body, field: fixed}
    return body


def json_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Override(Frozen):
    """Another width for the linears whose name matches: an exact name, or `re:` and a pattern."""

    match: str = Field(min_length=1, max_length=256)
    bits: Bits | None = None
    group_size: GroupSize | None = None
    scheme: SchemeName | None = None

    @model_validator(mode="before")
    @classmethod
    def scheme_fills(cls, body: object) -> object:
        return with_scheme_values(body) if isinstance(body, dict) else body

    @field_validator("match")
    @classmethod
    def pattern_compiles(cls, match: str) -> str:
        if match.startswith("re:"):
            check_pattern(match[3:])
        return match

    def matches(self, name: str) -> bool:
        return matches(self.match, name)


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the module `name`: the full name, its end, or `re:` and a full match."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)


class Recipe(Frozen):
    """One way to quantize: method, numbers, search.

    `scheme` wna16 is an integer grid for weights alone, with `bits`, `group_size` and `symmetric`; w4a16 and
    the like are its names with bits. The others fix all three.
    """

    method: Method = "awq"
    scheme: SchemeName = "wna16"
    bits: Bits = 4
    # auto: the largest that divides the inputs of all linears; a recorded job has the number
    group_size: Literal["auto", 16, 32, 64, 128, -1] = "auto"
    symmetric: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    ignore: tuple[str, ...] = ("lm_head",)
    indivisible: Literal["refuse", "nearest", "skip"] = "refuse"  # of in_features by group_size
    kv_cache: CacheName | None = None  # a scale each for keys and values, by which servers keep them so
    search: SearchSpec = SearchSpec()
    overrides: tuple[Override, ...] = Field(default=(), max_length=64)

    @field_validator("ignore")
    @classmethod
    def ignore_compiles(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in ignore:
            Override(match=pattern)
        return ignore

    @model_validator(mode="before")
    @classmethod
    def scheme_fills(cls, body: object) -> object:
        return with_scheme_values(body) if isinstance(body, dict) else body

    @model_validator(mode="after")
    def scheme_fits(self) -> Recipe:
        if self.method == "omniquant" and self.scheme != "wna16":
            raise ValueError(
                f"omniquant learns integer grids; use method awq or gptq with scheme {self.scheme}"
            )
        if self.scheme == "wna16" and self.group_size == 16:
            raise ValueError("groups of 16 belong to scheme nvfp4; use group_size 32, 64, 128 or -1")
        for override in self.overrides:
            fixed = SCHEMES[override.scheme or self.scheme]
            if fixed.bits is not None and override.bits not in (None, fixed.bits):
                raise ValueError(f"override {override.match!r}: scheme {self.scheme} has {fixed.bits} bits")
            if fixed.group_size is not None and override.group_size not in (None, fixed.group_size):
                raise ValueError(
                    f"override {override.match!r}: scheme {self.scheme} has group_size {fixed.group_size}"
                )
        return self

    @model_validator(mode="after")
    def rounding_fits_method(self) -> Recipe:
        if self.method == "rtn" and self.rounding == "gptq":
            raise ValueError("method rtn rounds to nearest; use method gptq for GPTQ rounding without scales")
        return self

    def scheme_of(self, *names: str) -> Scheme:
        """The scheme of a linear that is not ignored; the last override that matches a name counts."""
        assert self.group_size != "auto"
        scheme = Scheme(
            bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, name=self.scheme
        )
        for override in self.overrides:
            if any(override.matches(name) for name in names):
                named: dict[str, object] = {
                    "bits": override.bits, "group_size": override.group_size, "name": override.scheme,
                }  # fmt: skip
                changes = {field: value for field, value in named.items() if value is not None}
                if override.scheme is not None and override.scheme != scheme.name:
                    fixed = SCHEMES[override.scheme].symmetric
                    changes["symmetric"] = self.symmetric if fixed is None else fixed
                scheme = scheme.model_copy(update=changes)
        return scheme

    @property
    def needs_text(self) -> str | None:
        """Why the weights alone do not decide the outcome, and what to change; None if they do."""
        if self.method != "rtn":
            return f"method {self.method} calibrates on a text: use method rtn"
        if self.kv_cache is not None:
            return f"kv_cache {self.kv_cache} takes the range of keys and values from a text: leave it out"
        names = (self.scheme, *(override.scheme or self.scheme for override in self.overrides))
        for name in names:
            inputs = SCHEMES[name].inputs
            if inputs is not None and inputs.needs_range:
                return f"scheme {name} needs the range of inputs in a text: use {RANGELESS.get(name, 'fp8')}"
        return None

    @property
    def rounds_with_gptq(self) -> bool:
        """Method gptq is GPTQ rounding without scales; awq and omniquant may ask for it."""
        return self.method == "gptq" or self.rounding == "gptq"

    @property
    def inputs(self) -> Literal["full-precision chain", "quantized chain"]:
        """The chain that gives a layer's calibration inputs: the original's layers, or the quantized ones."""
        return "quantized chain" if self.has_own_chain else "full-precision chain"

    @property
    def has_own_chain(self) -> bool:
        """Whether it calibrates on its own quantized layers, and so shares inputs with no other recipe."""
        return self.rounds_with_gptq or self.method == "omniquant"

    @property
    def searches_scales(self) -> bool:
        """Whether AWQ's scales are searched; OmniQuant starts from them."""
        return self.method in ("awq", "omniquant")

    @property
    def searches_clip(self) -> bool:
        return self.method != "rtn" and self.search.clip

    @property
    def label(self) -> str:
        """A short name for tables: `awq w4 g128`, `awq+gptq w3 g64 sym`, `rtn fp8 kv fp8`."""
        method = f"{self.method}+gptq" if self.searches_scales and self.rounding == "gptq" else self.method
        cache = "" if self.kv_cache is None else f" kv {self.kv_cache}"
        if self.scheme != "wna16":
            return f"{method} {self.scheme}{cache}"
        group = {"auto": "", -1: " channel"}.get(self.group_size, f" g{self.group_size}")
        return f"{method} w{self.bits}{group}{' sym' if self.symmetric else ''}{cache}"


class TextSpec(Frozen):
    """The source of a text: a named dataset, or `texts` in the request."""

    dataset: str | None = Field(default=None, max_length=1024)
    texts: tuple[Text, ...] | None = Field(default=None, min_length=1, max_length=4096)
    # auto: for conversations; always: also a text, as a user's turn; never: roles and texts line by line
    chat_template: TemplateUse = "auto"
    num_samples: int = Field(default=128, ge=1, le=65536)

    @field_validator("chat_template", mode="before")
    @classmethod
    def older_values_have_names(cls, value: object) -> object:
        """`true` and `false` were the values of earlier versions."""
        return {True: "always", False: "auto"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def one_source(self) -> TextSpec:
        if self.dataset is not None and self.texts is not None:
            raise ValueError("give either `dataset` or `texts`, not both")
        return self

    @property
    def source(self) -> str:
        """The dataset reference; `inline` when the texts are in the request."""
        return "inline" if self.texts is not None else self.dataset or "builtin:wikitext2"

    @property
    def is_own_answers(self) -> bool:
        """Whether the text is written by the model that is quantized."""
        return self.source == OWN_ANSWERS


class CalibrationSpec(TextSpec):
    """Calibration windows: `num_samples` of `sequence_length` tokens, drawn with `seed`.

    With `all_experts` each expert's statistics are of every token, not of those alone that are routed to it;
    outputs stay the router's.
    """

    sequence_length: int = Field(default=512, ge=8, le=131072)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    all_experts: bool = False


class EvaluationSpec(TextSpec):
    """Held-out windows, taken from the start; without `sequence_length` they are as long as calibration's."""

    num_samples: int = Field(default=64, ge=1, le=65536)
    sequence_length: int | None = Field(default=None, ge=8, le=131072)
    # of lm-eval, scored on original and result
    tasks: tuple[TaskName, ...] = Field(default=(), max_length=32)
    task_limit: int | None = Field(default=None, ge=1, le=1_000_000)  # documents of each task, from the start

    @field_validator("dataset")
    @classmethod
    def text_is_not_the_models(cls, dataset: str | None) -> str | None:
        if dataset == OWN_ANSWERS:
            raise ValueError(f"{OWN_ANSWERS!r} is for calibration: no model may write what it is judged on")
        return dataset

    @field_validator("tasks")
    @classmethod
    def tasks_differ(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) != len(tasks):
            raise ValueError("each task may be named once")
        return tasks


class TargetSpec(Frozen):
    """The worst quality that may be published, relative to the original model, and the largest files."""

    max_perplexity_ratio: float | None = Field(default=None, gt=0, le=1000)
    max_kl: float | None = Field(default=None, gt=0, le=100)  # nats per token
    min_recovery: float | None = Field(default=None, gt=0, le=2)  # of the original's task scores, their mean
    # bytes of the files in a format, or text such as 5GB; alone: the least error within them is sought
    max_size: Annotated[ByteSize, Field(gt=0)] | None = None
    on_miss: Literal["fail", "publish"] = "fail"

    @model_validator(mode="after")
    def has_a_limit(self) -> TargetSpec:
        if not self.limits_quality and self.max_size is None:
            raise ValueError(
                "give `max_perplexity_ratio`, `max_kl`, `min_recovery`, `max_size`, or several of them"
            )
        return self

    @property
    def limits_quality(self) -> bool:
        """Whether the fewest bytes that reach it are sought; else the least error within `max_size`."""
        return any(limit is not None for limit in (self.max_perplexity_ratio, self.max_kl, self.min_recovery))

    def excess(
        self, perplexity_ratio: float, kl: float, recovery: float | None = None, size: int = 0
    ) -> float:
        """The largest share of a limit that the figures use; the target is met up to 1."""
        shares = [
            figure / limit
            for figure, limit in (
                (perplexity_ratio, self.max_perplexity_ratio),
                (kl, self.max_kl),
                (size, self.max_size),
            )
            if limit is not None
        ]
        if self.min_recovery is not None:
            shares.append(self.min_recovery / recovery if recovery else math.inf)
        return math.inf if any(math.isnan(share) for share in shares) else max(shares)

    @property
    def limits_text(self) -> str:
        """The limits in words."""
        ratio = f"at most {self.max_perplexity_ratio} times" if self.max_perplexity_ratio is not None else ""
        kl = f"a KL of at most {self.max_kl}" if self.max_kl is not None else ""
        recovery = f"{self.min_recovery:.4g} of the task scores" if self.min_recovery is not None else ""
        size = f"files of at most {int(self.max_size)} bytes" if self.max_size is not None else ""
        return " and ".join(filter(None, (ratio, kl, recovery, size)))


WebhookEvent = Literal[
    "job.started", "job.succeeded", "job.failed", "job.cancelled", "artifact.pushed", "artifact.push_failed"
]


class WebhookSpec(Frozen):
    """Where and for which events the service sends webhooks."""

    url: Annotated[str, Form(r"^https?://.+$", "a URL that begins with https:// or http://")] = Field(
        max_length=2048
    )
    events: tuple[WebhookEvent, ...] = Field(
        default=("job.succeeded", "job.failed", "job.cancelled"), min_length=1, max_length=6
    )


RepoId = Annotated[
    str,
    Form(
        r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
        "a hub repository: an account or organisation, / and a name",
    ),
]
BranchName = Annotated[
    str,
    Form(
        r"^(?!.*(\.\.|//))[A-Za-z0-9][A-Za-z0-9._/-]{0,126}[A-Za-z0-9]$|^[A-Za-z0-9]$",
        "a branch: at most 128 letters, digits and . _ / -, the first and last a letter or a digit",
    ),
]


class PushOptions(Frozen):
    """Where on the hub an artifact's files go, beside a model card."""

    repo_id: RepoId
    private: bool = True  # of a repository that does not exist yet
    revision: BranchName | None = None  # None: main; another branch is created where it is missing
    commit_message: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None


TimeoutSeconds = Annotated[int, Field(ge=1, le=7 * 24 * 3600)]


class JobSpec(Frozen):
    """The body of `POST /v1/jobs`."""

    model: str = Field(min_length=1, max_length=1024)
    # a LoRA adapter as peft saves it, merged into the weights before all else: a reference as `model`
    adapter: str | None = Field(default=None, min_length=1, max_length=1024)
    recipe: Recipe | Annotated[tuple[Recipe, ...], Field(min_length=1, max_length=16)] = Recipe()
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec | None = EvaluationSpec()  # None: weights alone are rounded, nothing is judged
    target: TargetSpec | None = None
    formats: tuple[FormatName, ...] = Field(default=("compressed-tensors",), min_length=1)
    serve_on: DeviceName | None = None  # the notes say what the schemes mean there
    priority: Literal["high", "normal", "low"] = "normal"
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=32)
    timeout_s: TimeoutSeconds = 14400
    queue_timeout_s: int | None = Field(default=None, ge=1, le=30 * 24 * 3600)  # waiting for its first start
    force: bool = False  # compute again even if the result exists
    webhook: WebhookSpec | None = None
    deploy: DeploymentOptions | None = None  # serve the first artifact once the job has succeeded
    push: PushOptions | None = None  # to the hub: the first artifact, too

    @field_validator("formats")
    @classmethod
    def formats_differ(cls, formats: tuple[FormatName, ...]) -> tuple[FormatName, ...]:
        if len(set(formats)) != len(formats):
            raise ValueError("each format may be named once")
        return formats

    @field_validator("target")
    @classmethod
    def recovery_has_tasks(cls, target: TargetSpec | None, body: ValidationInfo) -> TargetSpec | None:
        evaluation = body.data.get("evaluation")  # absent where it was refused
        if target is not None and target.min_recovery is not None and evaluation and not evaluation.tasks:
            raise ValueError("`min_recovery` needs tasks to score: name some in `evaluation.tasks`")
        return target

    @model_validator(mode="after")
    def weights_suffice(self) -> JobSpec:
        """Without an evaluation no text is read and the model is never run."""
        if self.evaluation is not None:
            return self
        if self.target is not None:
            raise ValueError('a target needs an evaluation: leave out `target`, or "evaluation": null')
        if self.calibration != CalibrationSpec():
            raise ValueError('"evaluation": null reads no text: leave out `calibration`')
        for index, recipe in enumerate(self.recipes):
            problem = recipe.needs_text
            if problem is not None:
                field = self.recipe_field(index)
                raise ValueError(f'{field}: {problem}, or leave out "evaluation": null')
        return self

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return self.recipe if isinstance(self.recipe, tuple) else (self.recipe,)

    @property
    def judged_on(self) -> EvaluationSpec:
        """The evaluation of a job that has one."""
        assert self.evaluation is not None
        return self.evaluation

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """Those of the evaluation."""
        return () if self.evaluation is None else self.evaluation.tasks

    @property
    def evaluation_length(self) -> int:
        """Tokens of an evaluation window."""
        return self.judged_on.sequence_length or self.calibration.sequence_length

    def with_recipes(self, recipes: Sequence[Recipe]) -> JobSpec:
        """The same job for as many other recipes; a single one stays single."""
        return self.model_copy(
            update={"recipe": tuple(recipes) if isinstance(self.recipe, tuple) else recipes[0]}
        )

    def recipe_field(self, index: int) -> str:
        """The path of a recipe in the body: `recipe`, or `recipe.<index>` in a list."""
        return f"recipe.{index}" if isinstance(self.recipe, tuple) else "recipe"
