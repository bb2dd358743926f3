"""Where everything lies in object storage; keys are built from ids alone."""

from __future__ import annotations

ARTIFACTS = "artifacts"
CHECKPOINTS = "checkpoints"
REPORTS = "reports"
FOLDERS = (ARTIFACTS, CHECKPOINTS, REPORTS)  # of tenants' things, each read by its id alone


def manifest_key(artifact_id: str) -> str:
    """Its creation is what makes an artifact exist."""
    return f"{ARTIFACTS}/{artifact_id}/manifest.json"


def report_key(job_id: str) -> str:
    return f"{REPORTS}/{job_id}.json"


def checkpoint_prefix(job_id: str) -> str:
    """Of the layers that a job has finished."""
    return f"{CHECKPOINTS}/{job_id}"
