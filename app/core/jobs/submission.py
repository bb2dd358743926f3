"""Checks a job before it is recorded: its model, recipe and texts, without reading a weight.

`POST /v1/jobs` and `POST /v1/estimates` share one function, so an estimate never accepts what a job refuses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import httpx

from app.core.deployments.context_length import check_length
from app.core.deployments.served_families import refuse_unserved_format, unserved_note
from app.core.errors import ModelRefused, TextRefused
from app.core.jobs.worker_registry import WorkerRegistry
from app.core.outgoing.address_guard import DestinationRefused, OutgoingGuard
from app.core.planning.cost_model import answers_bytes
from app.core.planning.device_profile import DeviceKind
from app.core.planning.model_free import StreamedPlan, plan_model_free
from app.core.planning.plan import Plan, plan_job
from app.core.planning.size_target import plan_within_size
from app.core.records.specs import OWN_ANSWERS, CalibrationSpec, EvaluationSpec, Frozen, JobSpec, TextSpec
from app.core.settings import Settings
from app.core.sources.adapter_model import adapter_files, inspect_merged
from app.core.sources.model_headers import ModelHeaders, merged_digest, with_code
from app.core.sources.model_reference import parse_model_reference
from app.core.sources.model_source import HubModel, LocalModel, ModelFiles, open_adapter, open_model
from app.core.sources.text_repetition import text_notes
from app.core.sources.text_source import check_text, is_remote
from app.core.sources.uploaded_text import open_job_text
from app.core.storage.reuse import Contents, fingerprint, text_key
from app.core.storage.storage_keys import FOLDERS

BUILTIN_TEXTS = ("builtin:wikitext2",)
ADDED_TOKENS = 4  # at most, to a text, for its beginning and end

TextSpecT = TypeVar("TextSpecT", CalibrationSpec, EvaluationSpec)


class CheckedSubmission(Frozen):
    """A job that may be recorded: `spec` names one commit of each hub repository and leaves nothing open."""

    spec: JobSpec
    plan: Plan | StreamedPlan
    download_bytes: int  # 0 for a folder of this host, which is read in place
    fingerprint: str


def check_submission(spec: JobSpec, settings: Settings) -> CheckedSubmission:
    """Look at the model's headers and the texts' existence.

    Raises ModelRefused, RecipeUnsupported or TextRefused, or Unavailable if a source does not answer.
    """
    if spec.webhook is not None:
        check_webhook(spec.webhook.url, settings)
    refuse_own_storage(spec.model, settings, param="model")
    files = open_model(spec.model, **settings.source_access)
    adapter = None
    if spec.adapter is not None:
        refuse_own_storage(spec.adapter, settings, param="adapter")
        adapter = open_adapter(spec.adapter, **settings.source_access)
    headers = inspect_merged(files, adapter)
    plan = planned(spec, headers)
    calibration, calibration_key = pinned_text(spec.calibration, settings, param="calibration")
    evaluation, evaluation_key = spec.evaluation, None
    if spec.evaluation is not None:
        evaluation, evaluation_key = pinned_text(spec.evaluation, settings, param="evaluation")
        require_length(spec.evaluation, spec.evaluation_length, section="evaluation")
    recipes = [candidate.recipe for candidate in plan.candidates]
    pinned = {
        "calibration": calibration,
        "evaluation": evaluation,
        "model": pinned_reference(spec.model, files),
        "adapter": None if adapter is None else pinned_reference(spec.adapter, adapter),
    }
    spec = spec.with_recipes(recipes).model_copy(update=pinned)
    weights = merged_digest(files.content_key(), None if adapter is None else adapter.content_key())
    contents = Contents(model=weights, calibration=calibration_key, evaluation=evaluation_key)
    require_length(spec.calibration, spec.calibration.sequence_length, section="calibration")
    calibrates, judges = ("\n".join((text and text.texts) or ()) for text in (calibration, evaluation))
    repeats = text_notes(calibrates, judges, "characters")
    return CheckedSubmission(
        spec=spec,
        plan=plan.model_copy(update={"notes": (*plan.notes, *repeats)}),
        download_bytes=fetched_bytes(files, headers.files)
        + (0 if adapter is None else fetched_bytes(adapter, adapter_files(adapter))),
        fingerprint=fingerprint(spec, contents),
    )


def pinned_reference(reference: str | None, files: ModelFiles) -> str | None:
    """The reference with its commit. Other sources than the hub have no versions to name: theirs stays as it
    was written."""
    return files.name if isinstance(files, HubModel) else reference


def fetched_bytes(files: ModelFiles, sizes: Mapping[str, int]) -> int:
    """How much of the files has to come to a worker."""
    return 0 if isinstance(files, LocalModel) else sum(sizes.values())


def require_memory(checked: CheckedSubmission, registry: WorkerRegistry) -> None:
    """Refuse own answers of a model that is too large for every living worker which says what it has."""
    plan = checked.plan
    if not checked.spec.calibration.is_own_answers or isinstance(plan, StreamedPlan):
        return
    workers = [worker for worker in registry.living() if worker.queue == "jobs"]
    kinds: list[DeviceKind] = ["cuda" if worker.device.startswith("cuda") else "cpu" for worker in workers]
    needed = [answers_bytes(plan, checked.spec, kind) for kind in kinds]
    room = [worker.memory_total for worker in workers]
    if not workers or any(own is None or size <= own for size, own in zip(needed, room, strict=True)):
        return
    raise ModelRefused(
        f"the model's own answers need {min(needed) / 1e9:.1f} GB, as the whole model is held while it "
        f"writes them; the largest device of a worker has {max(filter(None, room)) / 1e9:.1f} GB",
        code="model_too_large", param="calibration.dataset",
        remedy="name another calibration.dataset: the job then needs little more than a layer",
    )  # fmt: skip


def planned(spec: JobSpec, headers: ModelHeaders) -> Plan | StreamedPlan:
    """The plan, with what was noted about the model's files."""
    try:
        if spec.evaluation is None:
            plan: Plan | StreamedPlan = plan_model_free(spec, headers.config, headers.tensors)
        else:
            plan = plan_within_size(spec, lambda job: plan_job(job, headers.config, headers.tensors))
    except ModelRefused as fault:
        raise with_code(fault, headers.code) from fault
    if spec.deploy is not None:
        check_length(headers.config, spec.deploy, spec.deploy.engine, section="deploy.")
        refuse_unserved_format(spec.formats[0], param="deploy")
    deploy = spec.deploy and unserved_note(plan.model_type, spec.deploy.engine, param="deploy.engine")
    return plan.model_copy(update={"notes": (*headers.notes, *plan.notes, *filter(None, [deploy]))})


def refuse_own_storage(reference: str, settings: Settings, *, param: str) -> None:
    """Refuse a path in the service's own storage: objects there belong to tenants and are read by id only."""
    try:
        parsed = parse_model_reference(reference)
    except ModelRefused:  # opening it raises the same error, with a reason
        return
    storage = urlsplit(settings.object_store_url)
    if parsed.scheme != storage.scheme:
        return
    if parsed.scheme == "s3":
        root = f"{storage.netloc}{storage.path.rstrip('/')}"
        own = any(f"{parsed.bucket}/{parsed.path}/".startswith(f"{root}/{folder}/") for folder in FOLDERS)
    else:
        own = Path(os.path.realpath(parsed.path)).is_relative_to(os.path.realpath(unquote(storage.path)))
    if own:
        raise ModelRefused(
            f"{reference[:200]} lies in the service's own storage",
            code="model_path_forbidden",
            remedy="name a model or text of your own; artifacts are read with GET /v1/artifacts",
            param=param,
        )


def check_webhook(url: str, settings: Settings) -> None:
    """Refuse at submission a URL to which no webhook could be sent."""
    try:
        OutgoingGuard(settings.outgoing_networks).address(httpx.URL(url))
    except DestinationRefused as fault:
        fault.param = "webhook.url"
        raise
    except (httpx.ConnectError, httpx.InvalidURL) as fault:
        raise DestinationRefused(
            f"the webhook's URL can't be used: {fault}", remedy="correct the URL", param="webhook.url"
        ) from fault


def pinned_text(spec: TextSpecT, settings: Settings, *, param: str) -> tuple[TextSpecT, str]:
    """The spec with a hub dataset at its commit, and a key of the text's content.

    Raises TextRefused if its source does not exist.
    """
    if not is_remote(spec.source):
        if spec.texts is None and not spec.is_own_answers and spec.source not in BUILTIN_TEXTS:
            raise TextRefused(
                f"there is no bundled dataset {spec.source!r}",
                code="dataset_unknown",
                remedy=f"use {', '.join(BUILTIN_TEXTS)}, {OWN_ANSWERS}, an hf:, s3:// or file:// file, "
                "an upload: of yours, or inline texts",
                param=f"{param}.dataset",
            )
        return spec, text_key(spec)
    refuse_own_storage(spec.source, settings, param=f"{param}.dataset")
    try:
        text = open_job_text(spec.source, settings)
        check_text(text)
    except TextRefused as fault:
        fault.param = fault.param or f"{param}.dataset"
        raise
    key = f"{text.files.content_key()}/{text.path}"
    if not isinstance(text.files, HubModel):
        return spec, key
    pinned = f"hf:{text.files.repository}/{text.path}@{text.files.commit}"
    return spec.model_copy(update={"dataset": pinned}), key


def require_length(spec: TextSpec, sequence_length: int, *, section: str) -> None:
    """Refuse inline texts that can't fill the windows: a token covers at least a byte.

    What passes here can still be too short once tokenized. How much a chat template adds is not known here.
    """
    if spec.texts is None:
        return
    size = sum(len(text.strip().encode()) for text in spec.texts)
    most_tokens = math.inf if spec.chat_template == "always" else size + ADDED_TOKENS * len(spec.texts)
    if size == 0 or most_tokens < spec.num_samples * sequence_length:
        raise TextRefused(
            f"{size} bytes of text are too few for {spec.num_samples} windows of {sequence_length} tokens",
            code="text_too_short",
            remedy=f"send more text, or lower {section}.num_samples or {section}.sequence_length",
            param=f"{section}.texts",
        )
