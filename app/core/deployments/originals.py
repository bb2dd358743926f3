"""Originals: deployments of the model that an artifact was made of, unquantized.

The source is opened anew, as for a job, with the rights of the service alone: the hub token of a job is gone
when the job has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from app.core.errors import ModelRefused
from app.core.records.artifact import ArtifactManifest

OF_THE_HUB = ("model_gated", "model_forbidden", "model_not_found")
ASK_OPERATOR = (
    "let the operator set HF_TOKEN to a token that reads it: a job's hub token is gone when the job ends"
)
# A job on other copies of the same files has this artifact, which names the copy that was read first.
OR_ELSEWHERE = (
    "as the job read it, or submit a job with `force` on a copy that is there: its artifact names that"
)


@contextmanager
def about_original(manifest: ArtifactManifest) -> Iterator[None]:
    """Say of a refused model that it is the original of an artifact, and what can be done about that."""
    try:
        yield
    except ModelRefused as fault:
        remedy = fault.remedy
        if fault.code in OF_THE_HUB:
            is_hub = manifest.model.startswith("hf:")
            remedy = ASK_OPERATOR if is_hub else f"put the model back at {manifest.model}, {OR_ELSEWHERE}"
        raise ModelRefused(
            f"the original of {manifest.id} can't be served: {fault.message}",
            code=fault.code, remedy=remedy, param="original",
        ) from fault  # fmt: skip


def require_unchanged(manifest: ArtifactManifest, digest: str, adapter_digest: str | None) -> None:
    """Raises ModelRefused for other files than the job has read: they would be no baseline."""
    if (digest, adapter_digest) != (manifest.model_digest, manifest.adapter_digest):
        raise ModelRefused(
            f"the files of {manifest.model} have changed since {manifest.id} was made of them",
            code="original_changed", param="original",
            remedy="put the files back as the job read them, or quantize the model as it is now",
        )  # fmt: skip


def why_own_server(*, is_gguf: bool, has_adapter: bool) -> str | None:
    """Why only the service's own server serves an original; None if vLLM does too."""
    if is_gguf:
        return "it is a GGUF file"
    return "an adapter is merged into it while it is read" if has_adapter else None


def not_for_vllm(why: str) -> ModelRefused:
    return ModelRefused(
        f"vLLM does not serve this original: {why}", code="original_needs_transformers", param="engine",
        remedy="deploy it with engine transformers or auto",
    )  # fmt: skip
