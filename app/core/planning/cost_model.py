"""Seconds and bytes that a plan takes on a device, by what the engine does: counted, not fitted to a model.

Products of matrices are counted in operations, the steps of the search in weights at the rates that the
engine's own code was measured at, everything else in bytes that pass through memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from app.core.formats.file_format import Scheme
from app.core.planning.device_profile import Basis, DeviceKind, DeviceProfile, SearchStep
from app.core.planning.large_layers import held_parameters, largest_expert_linear, layers_by_expert
from app.core.planning.model_free import StreamedPlan
from app.core.planning.plan import CandidatePlan, LinearPlan, Plan
from app.core.records.job import Stage
from app.core.records.specs import Frozen, JobSpec, Recipe

# Of the engine; tests compare them.
SAMPLED_ROWS = 512
FINALISTS = 4
BATCH_TOKENS = 8192
CHUNK_TOKENS = 256
SECTION_TOKENS = 65_536
ANSWER_ROWS, ANSWER_TOKENS = 32, 256  # of the model's own answers: written together, tokens of one
EXPERT = ".experts."  # in the names of linears that see only the tokens routed to them
PART_BYTES = 1 << 26  # of an expert's linears, or statistics, that wait to be written
FILE_COPIES = 2  # of those while they are written
EXPERT_COPIES = 8  # of an expert's linear while it is searched and rounded: nothing else hides them
POPULATION_LOSSES = 2  # products per evaluation of the evolutionary search: ranking, and clip

Step = Literal["starting"] | Stage  # what takes a job's time, in order: the start of its process, and stages

START_SECONDS = 5.0  # the job's process: interpreter, torch, transformers
TEXT_SECONDS = 3.0  # the tokenizer, and tokenizing the texts
NETWORK = 5e7  # bytes/s from a hub or a bucket, assumed
HASHING = 1e9  # bytes/s
READING_BYTES = 8  # per weight, of looking for NaN and infinity

BASE_RAM_BYTES = 730_000_000  # interpreter, torch, transformers, tokenizer, and what the heap holds back
WORKING_SLACK = 1.05  # pages that the allocator holds between tensors; hosts differ by 2 %
TEXT_RAM_BYTES = 40_000_000  # more than that while the texts are tokenized, before any weight is read
# Arrays of (tokens of a chunk, vocabulary) in float32 at once: the last chunk's two log-probabilities, its
# probabilities and its terms, while the next chunk's logits become log-probabilities.
LOGIT_ARRAYS = 6
BASE_VRAM_BYTES = 600_000_000  # the CUDA context
# Bytes of memory traffic per value, from the number of passes over float32 arrays.
ROUNDING_BYTES = 60  # scale, round, clamp, scale back, difference
REPORTED_ROUNDINGS = 2  # of a linear: as it is stored, and plain for comparison
LESSON_WINDOWS = 32
HELD_BACK = 5
STEP_WINDOWS = 4
LESSON_FORWARDS = 3  # forward, and backward as two
CHAIN_FORWARDS = 2  # of the copy through a layer, with what can't be replayed between its groups
EXPERT_FORWARDS = 4  # where layers have experts: the copy starts anew for each group
REPLAYED_BYTES = 2 * 2**30  # of a copy's outputs that wait to be replayed
LESSON_BYTES = 120  # rounding of all weights and its gradients, per step
PACK_BYTES = 40
STREAMED_BYTES = 8  # a weight that is rounded by itself, in two compiled passes on two threads
STREAMED_START_SECONDS = 2.0  # the process without transformers
STREAMED_RAM_BYTES = 600_000_000  # interpreter, torch, and the slices of tensors in work
VERIFY_BYTES = 60
# An input value that a scheme rounds, of one linear: measured beside the rate of reading and writing arrays.
INPUT_BYTES = {("int", 8): 130, ("float", 8): 220, ("float", 4): 740}
# What a step of the search takes on other numbers, as a multiple of integers in groups: measured on a CPU by
# the engine's own steps at 256 and 1024 in_features, each between both.
STEP_FACTORS: Mapping[tuple[str, int], Mapping[SearchStep, float]] = {
    ("float", 8): {"scales": 1.65, "nearest": 1.2, "clip": 0.5, "gptq": 0.9},
    ("float", 4): {"scales": 2.1, "nearest": 1.4, "clip": 0.5, "gptq": 1.5},
}
WHOLE_ROWS_CLIP = 1.5  # of integers under one scale for a row
SOFTMAX_BYTES = 80
LAYER_BYTES = 40  # a decoder layer's norms, activations and residuals per token and channel
ATTENTION_BYTES = 24  # softmax, per head and pair of tokens
MOMENT_BYTES = 12  # means of |x|
MOMENT_BLOCK = {"cpu": 256, "cuda": 1024}  # columns; of each product the upper blocks are computed
LAYER_SECONDS = 0.01  # of a layer for one recipe: many small operations, whatever its size
FOLDER_SECONDS = 0.02  # of writing one format's folder, and of reading it back


class TaskSize(NamedTuple):
    """Of a bundled task; tokens are means of common tokenizers."""

    documents: int
    choices: int
    tokens: int  # that a choice reads
    scored: int  # tokens of a choice

    def rows(self, spec: JobSpec) -> int:
        """Of the documents that the job takes, one for each choice."""
        return min(self.documents, spec.judged_on.task_limit or self.documents) * self.choices


PROMPT_TOKENS = 64  # of the longest bundled prompt with its template, by common tokenizers
KEYS = ("k_proj", "v_proj")  # linears whose outputs are cached; of others as much as hidden states is assumed
IDLE_ROWS = 1.5  # steps over those that full rows would take: rows that end early wait for the longest
STEP_SECONDS = 2e-3  # of a layer in one step beside its products: calls, attention, the cache
SAMPLING_BYTES = 300  # of a row's logits: sorted, summed up, drawn from

TASK_SIZES = {
    "builtin:continuation": TaskSize(200, 4, 36, 11), "builtin:agreement": TaskSize(200, 2, 11, 5),
}  # fmt: skip
LM_EVAL_SECONDS = 1.5  # of its own work on a task of some hundred documents


class Prediction(Frozen):
    """Predicted time and sizes of a run. Output sizes are exact except for the files' metadata."""

    basis: Basis  # of the rates
    seconds: dict[Step, float]  # of the whole job
    candidate_seconds: tuple[dict[Stage, float], ...]  # of each recipe alone
    ram_bytes: int
    vram_bytes: int
    disk_bytes: int  # of the work folder
    output_bytes: tuple[int, ...]  # per recipe, all formats

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def predict(
    plan: Plan | StreamedPlan, spec: JobSpec, profile: DeviceProfile, *, download_bytes: int = 0
) -> Prediction:
    """Predict the recipes as given; further recipes that a target may try are not included."""
    if isinstance(plan, StreamedPlan):
        return predict_streamed(plan, profile, download_bytes)
    costs = Costs(plan, spec, profile)
    collecting = costs
    if spec.calibration.all_experts:  # while statistics are collected no token passes an expert by
        collecting = Costs(plan.model_copy(update={"routed_share": 1.0}), spec, profile)
    own = tuple(costs.candidate(candidate) for candidate in plan.candidates)
    seconds: dict[Step, float] = {
        "starting": START_SECONDS,
        Stage.FETCHING: costs.fetching(download_bytes),
        Stage.CALIBRATING: collecting.calibration(),
    }
    for stages in own:
        for stage, spent in stages.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    seconds[Stage.EVALUATING] = seconds.get(Stage.EVALUATING, 0.0) + costs.evaluation()
    working = working_bytes(plan, spec, profile.device)
    if spec.calibration.is_own_answers:
        seconds[Stage.CALIBRATING] += costs.answers()
        working = max(working, answers_bytes(plan, spec, profile.device))
    cuda = profile.device == "cuda"
    output = tuple(sum(candidate.output_bytes.values()) for candidate in plan.candidates)
    return Prediction(
        basis=profile.basis,
        seconds=seconds,
        candidate_seconds=own,
        ram_bytes=BASE_RAM_BYTES + max(TEXT_RAM_BYTES, working),
        vram_bytes=BASE_VRAM_BYTES + working if cuda else 0,
        disk_bytes=sum(output) + checkpoint_bytes(plan, spec),
        output_bytes=output,
    )


def predict_streamed(plan: StreamedPlan, profile: DeviceProfile, download_bytes: int) -> Prediction:
    """Of a job that is not evaluated: the files are read, rounded, written and read back."""
    own, outputs = list[dict[Stage, float]](), list[int]()
    for candidate in plan.candidates:
        written, formats = sum(candidate.output_bytes.values()), len(candidate.output_bytes)
        rounded = formats * sum(each.parameters for each in candidate.linears if each.scheme is not None)
        moved = formats * plan.model_bytes + written
        own.append(
            {
                Stage.PACKING: rounded * STREAMED_BYTES / profile.elementwise + moved / profile.disk,
                Stage.VERIFYING: written / HASHING,
                Stage.PUBLISHING: written / HASHING + written / profile.disk,
            }
        )
        outputs.append(written)
    seconds: dict[Step, float] = {
        "starting": STREAMED_START_SECONDS,
        Stage.FETCHING: download_bytes / NETWORK + plan.model_bytes / HASHING,
    }
    for stages in own:
        for stage, spent in stages.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return Prediction(
        basis=profile.basis,
        seconds=seconds,
        candidate_seconds=tuple(own),
        ram_bytes=STREAMED_RAM_BYTES,
        vram_bytes=0,
        disk_bytes=sum(outputs),  # a finished file's checkpoint is another name of it
        output_bytes=tuple(outputs),
    )


class Costs:
    """Predicts the seconds of each step of a run."""

    def __init__(self, plan: Plan, spec: JobSpec, profile: DeviceProfile) -> None:
        self.plan, self.spec, self.profile = plan, spec, profile
        self.length = spec.calibration.sequence_length
        self.linears = plan.candidates[0].in_layers
        self.inputs = inputs_of(plan)

    def tokens(self, linear: LinearPlan, tokens: float) -> float:
        """The number of `tokens` that reach the linear."""
        return tokens * (self.plan.routed_share if EXPERT in linear.name else 1.0)

    def product(self, rows: float, inner: float, columns: float, *, float32: bool = False) -> float:
        """Seconds of multiplying (rows, inner) by (inner, columns)."""
        size = (rows * inner * columns) ** (1 / 3)
        rate = self.profile.matmul_rate(int(size), float32=float32)
        return 2.0 * rows * inner * columns / rate

    def passes(self, values: float, bytes_per_value: float) -> float:
        return values * bytes_per_value / self.profile.elementwise

    def forward(self, samples: int, length: int | None = None) -> float:
        """Seconds of one model's decoder layers over `samples` windows of `length`, else calibration's."""
        length = length or self.length
        tokens = samples * length
        linears = sum(
            self.product(self.tokens(each, tokens), each.in_features, each.out_features)
            for each in self.linears
        )
        hidden, windows = self.plan.hidden_size, self.plan.num_layers * samples
        attention = 2 * windows * self.product(length, hidden, length)
        scores = self.passes(windows * self.plan.num_heads * length**2, ATTENTION_BYTES)
        values = sum(self.tokens(each, tokens) * each.out_features for each in self.linears)
        return linears + attention + scores + self.passes(values, LAYER_BYTES)

    def evaluation(self) -> float:
        """Seconds of one model's forward pass over the evaluation text, its logits and their losses."""
        samples, length = self.spec.judged_on.num_samples, self.spec.evaluation_length
        tokens, vocabulary, chunk = samples * length, self.plan.vocab_size, min(CHUNK_TOKENS, length)
        product = tokens / chunk * self.product(chunk, self.plan.hidden_size, vocabulary)
        text = self.forward(samples, length) + product + self.passes(tokens * vocabulary, SOFTMAX_BYTES)
        return text + sum(self.task(name) for name in self.spec.tasks)

    def input_rounding(self, candidate: CandidatePlan) -> float:
        """Seconds of rounding what the quantized linears read in the evaluation, tasks included."""
        spec = self.spec
        sizes = [TASK_SIZES[name] for name in spec.tasks if name in TASK_SIZES]
        tokens = spec.judged_on.num_samples * spec.evaluation_length
        tokens += sum(size.rows(spec) * size.tokens for size in sizes)
        seconds = 0.0
        for linear in candidate.linears:
            inputs = None if linear.scheme is None else linear.scheme.kind.inputs
            if inputs is not None:
                values = self.tokens(linear, tokens) * linear.in_features
                seconds += self.passes(values, INPUT_BYTES[inputs.numbers, inputs.bits])
        return seconds

    def task(self, name: str) -> float:
        """Seconds of one model's answers to a bundled task, and of lm-eval; of others the size is unknown."""
        size = TASK_SIZES.get(name)
        if size is None:
            return LM_EVAL_SECONDS
        rows = size.rows(self.spec)
        scored = rows * size.scored
        product = (
            scored / CHUNK_TOKENS * self.product(CHUNK_TOKENS, self.plan.hidden_size, self.plan.vocab_size)
        )
        softmax = self.passes(scored * self.plan.vocab_size, SOFTMAX_BYTES)
        return LM_EVAL_SECONDS + self.forward(rows, size.tokens) + product + softmax

    def fetching(self, download_bytes: int) -> float:
        """Seconds of bringing the model here, looking at every weight and tokenizing the texts."""
        read = self.passes(self.plan.parameters, READING_BYTES)
        return download_bytes / NETWORK + self.plan.model_bytes / HASHING + read + TEXT_SECONDS

    def calibration(self) -> float:
        """Seconds of one pass of the original, with the second moments and histograms."""
        samples = self.spec.calibration.num_samples
        tokens = samples * self.length
        histograms = self.passes(sum(each.parameters for each in self.linears), ROUNDING_BYTES)
        return self.forward(samples) + self.moments(tokens) + histograms

    def answers(self) -> float:
        """Seconds in which the whole model is read, and writes the calibration text token by token."""
        tokens = self.spec.calibration.num_samples * self.length
        steps = IDLE_ROWS * tokens / ANSWER_ROWS
        linears = sum(
            self.product(self.tokens(each, ANSWER_ROWS), each.in_features, each.out_features)
            for each in self.linears
        )
        head = self.product(ANSWER_ROWS, self.plan.hidden_size, self.plan.vocab_size)
        weights = self.passes(self.plan.parameters, weight_bytes(self.plan, self.profile.device))
        one = linears + head + weights + self.plan.num_layers * STEP_SECONDS
        one += self.passes(ANSWER_ROWS * self.plan.vocab_size, SAMPLING_BYTES)
        return self.passes(self.plan.parameters, READING_BYTES) + steps * one

    def moments(self, tokens: float) -> float:
        """Seconds of every group's second moment (blocks on and above the diagonal) and means."""
        block, seconds = MOMENT_BLOCK[self.profile.device], 0.0
        for width, share in self.inputs:
            blocks = -(-width // block)
            upper = (blocks + 1) / (2 * blocks)
            seconds += upper * self.product(width, share * tokens, width, float32=True)
            seconds += self.passes(share * tokens * width, MOMENT_BYTES)
        return seconds

    def drifts(self, tokens: float) -> float:
        """Seconds of the products of errors with every group's inputs."""
        return sum(self.product(width, share * tokens, width, float32=True) for width, share in self.inputs)

    def chain(self) -> float:
        """Seconds of the original and the quantized copy side by side, with moments and drifts."""
        samples = self.spec.calibration.num_samples
        tokens = samples * self.length
        forwards = EXPERT_FORWARDS if any(EXPERT in each.name for each in self.linears) else CHAIN_FORWARDS
        return forwards * self.forward(samples) + self.moments(tokens) + self.drifts(tokens)

    def candidate(self, candidate: CandidatePlan) -> dict[Stage, float]:
        """Seconds that one recipe adds to each stage."""
        quantized = sum(each.parameters for each in candidate.linears if each.scheme is not None)
        written = sum(candidate.output_bytes.values())
        packed = quantized * len(candidate.output_bytes)
        reading = self.passes(quantized, VERIFY_BYTES)
        checking = self.forward(1) + quantized / self.profile.disk  # each layer is checked, then kept
        checking += self.plan.steps * LAYER_SECONDS
        folders = FOLDER_SECONDS * len(candidate.output_bytes)
        own = {
            Stage.SEARCHING: self.scales(candidate) + self.rounding(candidate) + checking,
            Stage.PACKING: folders + self.passes(packed, PACK_BYTES) + written / self.profile.disk,
            Stage.VERIFYING: folders + self.passes(packed, VERIFY_BYTES) + written / self.profile.elementwise,
            Stage.EVALUATING: self.evaluation() + reading + self.input_rounding(candidate),
            Stage.PUBLISHING: written / HASHING + written / self.profile.disk,
        }
        if candidate.recipe.has_own_chain:
            own[Stage.CALIBRATING] = self.chain()
        if candidate.recipe.method == "omniquant":
            own[Stage.SEARCHING] += candidate.recipe.search.epochs * self.lesson_epoch(quantized)
        return own

    def lesson_epoch(self, quantized: int) -> float:
        """Seconds of one epoch of OmniQuant's learning, and of judging its outcome."""
        taught = min(LESSON_WINDOWS, self.spec.calibration.num_samples)
        rounding = self.passes(quantized, LESSON_BYTES) * taught / STEP_WINDOWS
        judging = max(1, taught // (HELD_BACK - 1))
        return LESSON_FORWARDS * self.forward(taught) + rounding + self.forward(judging)

    def scales(self, candidate: CandidatePlan) -> float:
        """Seconds of AWQ's scale search: candidates on sampled rows, the finalists on all."""
        recipe = candidate.recipe
        if not recipe.searches_scales:
            return 0.0
        return sum(
            (evaluations(recipe) * min(rows, SAMPLED_ROWS) + FINALISTS * rows)
            * width
            * step_factor("scales", scheme)
            * self.profile.search_seconds("scales", width)
            for rows, width, scheme in groups_of(self.plan, candidate)
        )

    def rounding(self, candidate: CandidatePlan) -> float:
        """Seconds of clip search and rounding of every linear, with the reported losses."""
        recipe = candidate.recipe
        steps: dict[SearchStep, float] = {"nearest": REPORTED_ROUNDINGS}
        if recipe.searches_clip:
            steps["clip"] = 1
        if recipe.rounds_with_gptq:
            steps["gptq"] = 1
        return sum(
            times
            * linear.parameters
            * step_factor(step, linear.scheme)
            * self.profile.search_seconds(step, linear.in_features)
            for linear in candidate.linears
            if linear.scheme is not None
            for step, times in steps.items()
        )


def evaluations(recipe: Recipe) -> int:
    """The number of candidates in one group's scale search."""
    search = recipe.search
    grid = search.grid_points + 1
    tried = 2 * grid if search.duo_scaling == "both" else grid
    return tried + POPULATION_LOSSES * search.budget if search.strategy == "evolutionary" else tried


def inputs_of(plan: Plan) -> list[tuple[int, float]]:
    """(channels, share of the tokens) of every input with a second moment, over all layers."""
    widths = {each.name: each.in_features for each in plan.candidates[0].linears}
    inputs = []
    for layer in range(plan.steps):
        prefix = plan.architecture.layer_prefix(layer)
        inputs += [
            (widths[prefix + group.balance_layers[0]], plan.routed_share if group.expert else 1.0)
            for group in plan.architecture.at(layer).groups
            if prefix + group.balance_layers[0] in widths
        ]
    return inputs


def step_factor(step: SearchStep, scheme: Scheme) -> float:
    """Of a step of the search: what the scheme's numbers take beside integers in groups."""
    kind = scheme.kind
    if kind.numbers == "int":
        return WHOLE_ROWS_CLIP if step == "clip" and scheme.group_size == -1 else 1.0
    return STEP_FACTORS[kind.numbers, scheme.bits].get(step, 1.0)


def groups_of(plan: Plan, candidate: CandidatePlan) -> list[tuple[int, int, Scheme]]:
    """(rows, channels, scheme of the first linear) of every group with a scale search."""
    linears = {each.name: each for each in candidate.linears}
    groups = []
    for layer in range(plan.steps):
        prefix = plan.architecture.layer_prefix(layer)
        for group in plan.architecture.at(layer).groups:
            members = [linears[prefix + name] for name in group.balance_layers if prefix + name in linears]
            scheme = members[0].scheme if members and all(each.scheme for each in members) else None
            if group.smooth_layer is not None and scheme is not None:
                rows = sum(each.out_features for each in members)
                groups.append((rows, members[0].in_features, scheme))
    return groups


def largest_layer_moments(plan: Plan, apart: frozenset[int]) -> int:
    """Bytes of second moments in the layer with the most; of the layers in `apart` one expert's are held."""
    per_layer: dict[int, int] = {}
    widths = {each.name: each.in_features for each in plan.candidates[0].linears}
    for layer in range(plan.steps):
        prefix = plan.architecture.layer_prefix(layer)
        sizes: dict[bool, list[int]] = {True: [0], False: [0]}  # by whether an expert alone has the input
        for group in plan.architecture.at(layer).groups:
            size = 4 * widths.get(prefix + group.balance_layers[0], 0) ** 2
            sizes[group.expert is not None].append(size)
        experts = max(sizes[True]) if layer in apart else sum(sizes[True])
        per_layer[layer] = sum(sizes[False]) + experts
    return max(per_layer.values())


def task_tokens(spec: JobSpec) -> int:
    """Tokens of tasks whose hidden states are held at once; where the size is unknown as many as may be."""
    sizes = [TASK_SIZES.get(name) for name in spec.tasks]
    tokens = sum(SECTION_TOKENS if one is None else one.rows(spec) * one.tokens for one in sizes)
    return min(SECTION_TOKENS, tokens)


def working_bytes(plan: Plan, spec: JobSpec, device: DeviceKind) -> int:
    """The largest of looking tokens up, calibrating with search, passing windows on, and comparing logits."""
    learns = any(candidate.recipe.method == "omniquant" for candidate in plan.candidates)
    apart = frozenset[int]() if learns else layers_by_expert(plan, device)  # it learns from whole layers
    layer = held_parameters(plan, apart)
    table = 4 * plan.vocab_size * plan.hidden_size  # the embedding, or the head, in float32
    stored = 0 if plan.dtype == "float32" else table // 2  # as the checkpoint has it, while it is read
    channels = 4 * plan.hidden_size
    calibration, evaluation = spec.calibration, spec.judged_on
    length = calibration.sequence_length
    states = calibration.num_samples * length * channels
    chains = sum(candidate.recipe.has_own_chain for candidate in plan.candidates)
    solving = 4 * 4 * layer + 3 * largest_layer_moments(plan, apart)
    if apart:
        solving += EXPERT_COPIES * 4 * largest_expert_linear(plan, apart) + FILE_COPIES * PART_BYTES
    calibrating = states + activations(plan, calibration.num_samples, length) + solving
    if chains:
        widest = max(each.in_features for each in plan.candidates[0].linears)
        waiting = 3 * states + 4 * calibration.num_samples * length * widest
        calibrating += 6 * chains * states + min(REPLAYED_BYTES, waiting)
    models = 1 + len(plan.candidates)
    text = evaluation.num_samples * spec.evaluation_length * channels
    outputs = max(models * text, text + models * task_tokens(spec) * channels)
    passing = 2 * 4 * layer + activations(plan, evaluation.num_samples, spec.evaluation_length)
    logits = LOGIT_ARRAYS * 4 * min(CHUNK_TOKENS, spec.evaluation_length) * plan.vocab_size
    comparing = outputs + table + max(stored, logits)
    return int(WORKING_SLACK * max(table + stored + states, calibrating, outputs + passing, comparing))


def weight_bytes(plan: Plan, device: DeviceKind) -> int:
    """Of a weight as the engine computes with it."""
    return 4 if device == "cpu" or plan.dtype == "float32" else 2


def answers_bytes(plan: Plan, spec: JobSpec, device: DeviceKind) -> int:
    """The whole model, its cache of keys and values, and logits, while it writes its calibration text."""
    size = weight_bytes(plan, device)
    cached = [each.out_features for each in plan.candidates[0].linears if each.name.endswith(KEYS)]
    width = sum(cached) or 2 * plan.num_layers * plan.hidden_size
    needed = spec.calibration.num_samples * spec.calibration.sequence_length
    tokens = ANSWER_ROWS * (PROMPT_TOKENS + min(ANSWER_TOKENS, -(-needed // ANSWER_ROWS)))
    cache = tokens * width * size * (1 + 1 / plan.num_layers)  # a layer's is copied when it grows
    table = plan.vocab_size * plan.hidden_size * size  # a tied head is held twice
    logits = LOGIT_ARRAYS * 4 * ANSWER_ROWS * plan.vocab_size
    return int(WORKING_SLACK * (plan.parameters * size + table + cache + logits))


def activations(plan: Plan, samples: int, length: int) -> int:
    """Bytes inside a decoder layer while a batch of windows passes."""
    widest = max(each.out_features for each in plan.candidates[0].in_layers)
    return 4 * 4 * min(max(1, BATCH_TOKENS // length), samples) * length * widest


def checkpoint_bytes(plan: Plan, spec: JobSpec) -> int:
    """Finished layers, hidden states, and with a target the statistics."""
    quantized = sum(
        each.parameters for candidate in plan.candidates for each in candidate.linears if each.scheme
    )
    states = 4 * spec.calibration.num_samples * spec.calibration.sequence_length * plan.hidden_size
    statistics = 4 * sum(width * width for width, _ in inputs_of(plan)) if spec.target else 0
    return int(1.1 * quantized) + 2 * states + statistics
