"""The steps of a run, and what they share: the model, the device, the clock, the candidates so far."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from app.core.child.assignment import CHECKPOINTS, Assignment
from app.core.jobs.report import LayerReport, WeightHistogram
from app.core.planning.cost_model import predict
from app.core.planning.device_profile import NOMINAL, DeviceKind
from app.core.planning.plan import CandidatePlan, Plan, plan_job
from app.core.records.job import Stage
from workers.child.account import Account, Send
from workers.child.layer_checkpoints import LayerCheckpoints, resume_layer
from workers.child.layer_solver import CalibratedLayer, LayerSolver
from workers.child.layer_writer import LayerWriter
from workers.child.outputs import Outputs
from workers.child.quality_report import Outcome
from workers.child.quantized_chains import QuantizedChains
from workers.child.ranks import SharedWork, devices_of, started
from workers.child.stamped_files import identity_digest
from workers.child.statistics_store import STATISTICS, LayerStatistics, StatisticsStore
from workers.devices.selection import select_device
from workers.formats.folder import FormatFolder
from workers.modeling.checkpoint import Checkpoint
from workers.modeling.decoder import Decoder
from workers.modeling.prefetch import WeightPrefetch, layer_reads
from workers.modeling.side_files import write_side_files
from workers.modeling.soundness import refuse_broken_weights, refuse_foreign_tokens, refuse_misfits, some
from workers.quantization.calibration import CalibrationPass
from workers.quantization.evaluation import Quality, compare, final_states
from workers.quantization.histograms import weight_histogram
from workers.quantization.layer import LayerResult
from workers.quantization.paired_pass import PairedPass
from workers.quantization.reduction import ALONE, Ranks
from workers.texts.windows import Windows, calibration_windows, evaluation_windows, load_tokenizer

BATCH_TOKENS = 8192
TOKENIZER = "tokenizer"
STATES_INTERVAL_S = 20.0  # hidden states are large: losing up to this much forward time costs less


class Pipeline:
    """One assignment on its device."""

    def __init__(self, assignment: Assignment, send: Send) -> None:
        self.assignment, self.spec, self.send = assignment, assignment.spec, send
        self.device = select_device(assignment.device)
        self.checkpoint = Checkpoint(assignment.model_folder)
        self.plan: Plan = plan_job(self.spec, self.checkpoint.config, self.checkpoint.tensors)
        kind: DeviceKind = "cuda" if self.device.type == "cuda" else "cpu"
        self.prediction = predict(self.plan, self.spec, assignment.profile or NOMINAL[kind])
        weight_dtype: torch.dtype = getattr(torch, self.plan.dtype)
        self.compute_dtype = torch.float32 if self.device.type == "cpu" else weight_dtype
        self.solver = LayerSolver(self.plan, self.checkpoint, self.compute_dtype)
        self.account = Account(send, self.device, self.plan.num_layers)
        self.writer = LayerWriter(self.device)
        self.saved = time.monotonic()  # when the states were
        self.outputs = Outputs(assignment, self.checkpoint, self.plan, self.device)
        self.histograms: list[WeightHistogram] = []
        self.original: Quality | None = None
        self.original_states: list[Tensor] = []  # after the last layer, on the evaluation text
        self.outcomes: list[Outcome] = []

    def read_texts(self) -> tuple[Windows, Windows]:
        with self.account.stage(Stage.FETCHING):
            # As it will lie beside the artifact: no stray file and no code of the model's folder is seen.
            folder = self.assignment.work_folder / TOKENIZER
            write_side_files(self.checkpoint, folder, self.checkpoint.config)
            tokenizer = load_tokenizer(folder)
            calibration = calibration_windows(
                self.spec.calibration, tokenizer, self.assignment.calibration_file
            )
            evaluation = evaluation_windows(
                self.spec.evaluation, self.spec.calibration.sequence_length, tokenizer,
                self.assignment.evaluation_file,
            )  # fmt: skip
            refuse_foreign_tokens(torch.cat([calibration.tokens, evaluation.tokens]), self.plan.vocab_size)
        return calibration, evaluation

    def check_shapes(self) -> None:
        """Refuse a model whose weights are not those of its config. Raises ModelRefused."""
        with self.account.stage(Stage.FETCHING):
            unused = refuse_misfits(self.decoder())
            self.checkpoint.unused = frozenset(unused)
        if unused:
            self.account.note(
                "unused_tensors",
                "by config.json no part of the model, copied as they are and not loaded by Nibble's server: "
                + some(unused),
            )

    def check_weights(self) -> None:
        """Refuse what would else be found layers later. Raises ModelRefused.

        A GPU comes to the last layer about as soon as its weights can be read twice.
        """
        if self.device.type == "cuda":
            return
        with self.account.stage(Stage.FETCHING):
            refuse_broken_weights(self.checkpoint)

    def identity(self, calibration: Windows, **more: object) -> str:
        """What finished layers and statistics belong to: another version may compute others."""
        return identity_digest(
            nibble=version("nibble"),
            model=self.assignment.model_digest,
            tokens=calibration.digest,
            device=self.device.type,
            dtype=str(self.compute_dtype),
            **more,
        )

    def open_checkpoints(self, calibration: Windows) -> LayerCheckpoints:
        identity = self.identity(calibration, recipes=[recipe.model_dump() for recipe in self.spec.recipes])
        return LayerCheckpoints(self.assignment.work_folder / CHECKPOINTS, identity, self.send)

    def open_statistics(self, calibration: Windows) -> StatisticsStore:
        return StatisticsStore(self.assignment.work_folder / STATISTICS, self.identity(calibration))

    def calibrate(
        self, calibration: Windows, checkpoints: LayerCheckpoints, statistics: StatisticsStore | None
    ) -> int:
        """Calibrate and solve every layer; the layer at which a resumed run went on."""
        num_layers = self.plan.num_layers
        resumed_at = resume_layer(checkpoints, num_layers, len(self.plan.candidates))
        if resumed_at:
            self.account.note("resumed", f"{resumed_at} of {num_layers} layers were finished before")
            self.describe_finished(resumed_at)
        if resumed_at == num_layers:
            return resumed_at
        layers = range(resumed_at, num_layers)
        with self.ranks(calibration, layers, self.plan.candidates) as ranks:
            run = self.start_pass(calibration, checkpoints, resumed_at, ranks)
            chains = self.start_chains(self.plan.candidates, run.decoder, calibration, ranks)
            chains.catch_up(resumed_at, checkpoints)
            with closing(WeightPrefetch(self.device, layer_reads(run.decoder, layers))) as weights:
                for layer in layers:
                    calibrated = self.calibrate_next_layer(run, weights)
                    if statistics is not None:
                        statistics.save(layer, calibrated.statistics)
                    for candidate in self.plan.candidates:
                        self.solve(candidate, calibrated, run, chains, checkpoints)
                    self.save_states(run, checkpoints, layer + 1, whole=ranks.size == 1)
                    self.account.progress(0.6 * (layer + 1) / num_layers, layer + 1)
        return resumed_at

    def ranks(
        self,
        calibration: Windows,
        layers: range,
        candidates: tuple[CandidatePlan, ...] = (),
        *,
        calibrates: bool = True,
    ) -> AbstractContextManager[Ranks]:
        """The devices that share what is passed through these layers of the models."""
        work = SharedWork(
            start=layers.start,
            stop=layers.stop,
            calibrates=calibrates,
            candidates=tuple(candidate for candidate in candidates if candidate.recipe.has_own_chain),
        )
        num_batches = len(self.batches(calibration))
        if self.assignment.calibration_devices and not work.is_empty:
            self.note_devices(devices_of(self.assignment, num_batches), work)
        return started(self.assignment, work, num_batches)

    def note_devices(self, devices: tuple[str, ...], work: SharedWork) -> None:
        """What the further devices do, and what they leave to the first one."""
        further = len(self.assignment.calibration_devices)
        if len(devices) > 1:
            learns = any(candidate.recipe.method == "omniquant" for candidate in work.candidates)
            alone = "searches, rounds and learns" if learns else "searches and rounds"
            shared = f"{', '.join(devices)} share the calibration batches; {devices[0]} alone {alone}"
            self.account.note("devices", shared)
        if len(devices) <= further:
            idle = 1 + further - len(devices)
            self.account.note(
                "devices_idle", f"the text has {len(devices)} calibration batches: {idle} devices stay idle"
            )

    def save_states(
        self, run: CalibrationPass, checkpoints: LayerCheckpoints, layer: int, *, whole: bool
    ) -> None:
        """The inputs of `layer` from time to time, unless other processes have a part of them."""
        if whole and layer < self.plan.num_layers and time.monotonic() - self.saved > STATES_INTERVAL_S:
            self.writer.put(partial(checkpoints.save_states, layer, list(run.states)))
            self.saved = time.monotonic()

    def start_chains(
        self,
        candidates: tuple[CandidatePlan, ...],
        decoder: Decoder,
        calibration: Windows,
        ranks: Ranks = ALONE,
    ) -> QuantizedChains:
        """The passes of the recipes that are calibrated on their own errors, before layer 0."""
        return QuantizedChains(
            candidates,
            lambda: PairedPass(decoder, self.batches(calibration), ranks),
            lambda recipe: self.account.counted(Stage.CALIBRATING, recipe),
        )

    def decoder(self) -> Decoder:
        """The model, without a layer's weights."""
        return Decoder(self.checkpoint, self.plan.architecture, self.device, self.compute_dtype)

    def batches(self, windows: Windows) -> list[Tensor]:
        return windows.batches(max(1, BATCH_TOKENS // self.spec.calibration.sequence_length))

    def start_pass(
        self, calibration: Windows, checkpoints: LayerCheckpoints, layer: int, ranks: Ranks = ALONE
    ) -> CalibrationPass:
        """A pass that stands before `layer`, from the hidden states that were saved nearest to it."""
        with self.account.stage(Stage.CALIBRATING):
            run = CalibrationPass(self.decoder(), self.batches(calibration), ranks)
            saved = checkpoints.latest_states(layer)
            if saved is not None:
                run.restore(*saved)
            while run.layer < layer:
                run.skip()
        return run

    def calibrate_next_layer(self, run: CalibrationPass, prefetch: WeightPrefetch) -> CalibratedLayer:
        layer = run.layer
        with self.account.stage(Stage.CALIBRATING):
            weights = prefetch.take()
            statistics = self.collect(run, weights)
        full = {name: value.to(self.device, torch.float32) for name, value in weights.items()}
        self.describe(layer, full)
        few = sum(group.confidence < 1 for group in statistics.groups)
        if few:
            experts = sum(group.routed_tokens is not None for group in statistics.groups)
            self.account.note(
                "few_tokens", f"layer {layer}: {few} of {experts} experts saw too few calibration tokens"
            )
        return CalibratedLayer(layer, full, statistics)

    def describe(self, layer: int, weights: dict[str, Tensor]) -> None:
        """The histograms of a layer's float32 weights, for the report."""
        prefix = self.plan.architecture.layer_prefix(layer)
        self.histograms += [
            weight_histogram(prefix + name, weights[name + ".weight"])
            for name in self.plan.architecture.at(layer).linears
        ]

    def describe_finished(self, resumed_at: int) -> None:
        """Those of the layers that an earlier attempt finished."""
        reads = layer_reads(self.decoder(), range(resumed_at))
        with self.account.stage(Stage.CALIBRATING), closing(WeightPrefetch(self.device, reads)) as weights:
            for layer in range(resumed_at):
                read = weights.take()
                self.describe(
                    layer, {name: value.to(self.device, torch.float32) for name, value in read.items()}
                )

    def collect(self, run: CalibrationPass, weights: dict[str, Tensor]) -> LayerStatistics:
        groups, *probe = run.collect(weights)
        return LayerStatistics(groups, (probe[0], probe[1]))

    def solve(
        self,
        candidate: CandidatePlan,
        calibrated: CalibratedLayer,
        run: CalibrationPass,
        chains: QuantizedChains,
        checkpoints: LayerCheckpoints,
    ) -> None:
        """One layer for one recipe, kept as a checkpoint; the recipe's own chain goes on behind it."""
        original = calibrated.weights
        with self.account.stage(Stage.SEARCHING, candidate.recipe_index):
            own = chains.view(candidate, original)
            result, report = self.solver.solve(candidate, calibrated, run, own)
            self.writer.put(lambda: self.keep_layer(candidate, checkpoints, result, report))
            chains.advance(candidate, original, result)

    def keep_layer(
        self,
        candidate: CandidatePlan,
        checkpoints: LayerCheckpoints,
        result: LayerResult,
        report: LayerReport,
    ) -> None:
        """The layer's checkpoint; on a GPU its packed tensors too, while the integers lie there."""
        checkpoints.save_layer(candidate.recipe_index, result, report)
        if self.device.type == "cuda":
            load_layer = partial(self.load_layer, checkpoints, candidate.recipe_index)
            self.outputs.add_layer(candidate, report.layer, result, load_layer)

    def load_layer(self, checkpoints: LayerCheckpoints, recipe: int, layer: int) -> LayerResult:
        return checkpoints.load_layer(recipe, layer).to(self.device)

    def judge(
        self, candidates: tuple[CandidatePlan, ...], checkpoints: LayerCheckpoints, evaluation: Windows
    ) -> None:
        """Pack, verify and evaluate candidates whose layers are all solved; their outcomes."""
        folders = []
        for candidate in candidates:
            folders.append(self.pack(candidate, checkpoints))
            self.account.progress(0.6 + 0.1 * len(folders) / len(candidates), self.plan.num_layers)
        single = candidates[0].recipe_index if self.outcomes else None
        with self.account.stage(Stage.EVALUATING, single):
            qualities = self.evaluate(evaluation, folders)
        layers = range(self.plan.num_layers)
        self.outcomes += [
            Outcome(
                candidate=candidate,
                quality=quality,
                folders=row,
                bytes={folder.name: folder.weight_bytes for folder in row},
                layers=[checkpoints.layer_report(candidate.recipe_index, layer) for layer in layers],
            )
            for candidate, quality, row in zip(candidates, qualities, folders, strict=True)
        ]

    def pack(self, candidate: CandidatePlan, checkpoints: LayerCheckpoints) -> list[FormatFolder]:
        """The candidate in every format, written and read back."""
        index = candidate.recipe_index
        load_layer = partial(self.load_layer, checkpoints, index)
        for folder in self.outputs.of(candidate):
            with self.account.stage(Stage.PACKING, index):
                self.writer.finish()
                folder.write(load_layer, self.assignment.shard_bytes)
            with self.account.stage(Stage.VERIFYING, index):
                folder.verify(load_layer)
        return self.outputs.of(candidate)

    def evaluate(self, windows: Windows, folders: list[list[FormatFolder]]) -> list[Quality]:
        """Every candidate as its first format's files say it is; the original once, on the first call."""
        decoder = self.decoder()
        models = [partial(row[0].read_weights, Checkpoint(row[0].folder)) for row in folders]
        batches = self.batches(windows)
        total = self.plan.num_layers
        pinned = self.device.type == "cuda"
        first = [] if self.original_states else [partial(decoder.layer_weights, pinned=pinned)]
        states = final_states(
            decoder,
            batches,
            [*first, *models],
            lambda layer: self.account.progress(0.7 + 0.29 * (layer + 1) / total, total),
        )
        if first:
            self.original_states = states.pop(0)
        self.original, *qualities = compare(decoder, batches, [self.original_states, *states])
        return qualities

    def figures(self, outcome: Outcome) -> dict[str, float | str]:
        assert self.original is not None
        return {
            "label": outcome.candidate.label,
            "perplexity": outcome.quality.perplexity,
            "perplexity_ratio": outcome.quality.perplexity / self.original.perplexity,
            "kl": outcome.quality.kl,
            "bits_per_weight": outcome.candidate.bits_per_weight,
        }

    def excess(self, outcome: Outcome) -> float:
        assert self.spec.target is not None
        assert self.original is not None
        ratio = outcome.quality.perplexity / self.original.perplexity
        return self.spec.target.excess(ratio, outcome.quality.kl)
