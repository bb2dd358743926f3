"""A typed client of Nibble's HTTP API, used by the terminal: one that blocks, one for event loops."""

from app.client.awaiting import AsyncNibbleClient
from app.client.blocking import NibbleClient
from app.client.errors import (
    BadRequest,
    Conflict,
    DownloadCorrupt,
    Forbidden,
    InferenceRefused,
    Invalid,
    JobEnded,
    NotFound,
    ServiceFault,
    ServiceRefused,
    ServiceUnreachable,
    TooMany,
    Unauthenticated,
    Unavailable,
    WaitTimedOut,
)
from app.client.retries import Retries
from app.client.views import ArtifactView, DeploymentView, EventView, JobView

__all__ = [
    "ArtifactView",
    "AsyncNibbleClient",
    "BadRequest",
    "Conflict",
    "DeploymentView",
    "DownloadCorrupt",
    "EventView",
    "Forbidden",
    "InferenceRefused",
    "Invalid",
    "JobEnded",
    "JobView",
    "NibbleClient",
    "NotFound",
    "Retries",
    "ServiceFault",
    "ServiceRefused",
    "ServiceUnreachable",
    "TooMany",
    "Unauthenticated",
    "Unavailable",
    "WaitTimedOut",
]
