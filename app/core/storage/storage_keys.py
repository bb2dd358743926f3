"""The layout of object storage; keys are built from ids alone."""

from __future__ import annotations

ARTIFACTS = "artifacts"
CHECKPOINTS = "checkpoints"
REPORTS = "reports"
DATASETS = "datasets"
FOLDERS = (ARTIFACTS, CHECKPOINTS, REPORTS, DATASETS)  # of tenants' objects, which are read by id only


def manifest_key(artifact_id: str) -> str:
    """The key of an artifact's manifest; creating it publishes the artifact."""
    return f"{ARTIFACTS}/{artifact_id}/manifest.json"


def report_key(job_id: str) -> str:
    return f"{REPORTS}/{job_id}.json"


def dataset_folder(dataset_id: str) -> str:
    return f"{DATASETS}/{dataset_id}"


def dataset_manifest_key(dataset_id: str) -> str:
    """The key of a dataset's manifest; creating it makes the dataset exist."""
    return f"{DATASETS}/{dataset_id}/manifest.json"


def dataset_content_key(dataset_id: str) -> str:
    return f"{DATASETS}/{dataset_id}/content"


def checkpoint_prefix(job_id: str) -> str:
    """The folder of a job's finished layers."""
    return f"{CHECKPOINTS}/{job_id}"
