"""A typed client of Nibble's HTTP API, blocking or asynchronous; the terminal commands use it."""

from app.client.clients import AsyncNibbleClient, NibbleClient
from app.client.errors import (
    BadRequest,
    DownloadCorrupt,
    InferenceRefused,
    Invalid,
    JobEnded,
    ServiceFault,
    ServiceRefused,
    ServiceUnreachable,
    TooMany,
    WaitTimedOut,
)
from app.client.retries import Retries
from app.client.views import ArtifactAnswer, DatasetAnswer, DeploymentAnswer, EventAnswer, JobAnswer
from app.core.errors import (
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "ArtifactAnswer",
    "AsyncNibbleClient",
    "BadRequest",
    "Conflict",
    "DatasetAnswer",
    "DeploymentAnswer",
    "DownloadCorrupt",
    "EventAnswer",
    "Forbidden",
    "InferenceRefused",
    "Invalid",
    "JobAnswer",
    "JobEnded",
    "NibbleClient",
    "NotFound",
    "PreconditionFailed",
    "Retries",
    "ServiceFault",
    "ServiceRefused",
    "ServiceUnreachable",
    "TooMany",
    "Unauthenticated",
    "Unavailable",
    "WaitTimedOut",
]
