"""Every error that a caller can meet, as one tree.

    NibbleError                 code, message, remedy, param
    ├── InvalidRequest          the request itself is wrong
    │   ├── MalformedRequest    the body or a header can't even be read
    │   │   ├── BodyTooLarge    it has more bytes than are taken
    │   │   └── BodyTooSlow     it did not arrive in time
    │   ├── RecipeUnsupported   the recipe is well formed, but this model or format can't hold it
    │   ├── ModelRefused        the model's files are missing, unsafe or of an unknown architecture
    │   └── TextRefused         the calibration or evaluation text is missing or too short
    ├── Unauthenticated         no key, or one that is not known
    ├── Forbidden               the key lacks a scope
    ├── NotFound                no such job, artifact or file for this tenant
    ├── Conflict                the state of the resource does not allow it
    ├── PreconditionFailed      it is not the version that the caller has read
    ├── QueueFull               no room for another job
    ├── QuotaExceeded           the tenant has used up what it may use
    ├── RateLimited             the tenant sends more requests than it may
    ├── Unavailable             Redis or object storage does not answer
    │   ├── RecordUnreadable    damaged, or written by another version of the service
    │   └── Paused              its owner has stopped it
    └── JobFault                a job that was accepted ends without a result
        ├── WorkerLost          its worker stopped renewing the lease
        ├── DeadlineExceeded    it ran longer than `timeout_s`
        ├── ChildKilled         its process was killed from outside
        ├── OutOfMemory         the host or the device ran out of memory
        ├── DeviceFault         the device was lost, is taken, or is in error
        ├── WorkerDisk          the worker can't write or read its own files
        ├── VerificationFailed  the written files do not hold what was evaluated
        └── TargetMissed        the quality target was not met

`code` is stable and machine-readable; `remedy` says what to change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# How pydantic names the branches of our unions (`recipe`, `duo_scaling`) in an error's path.
BRANCH = re.compile(r"Recipe$|bool$|\[key\]$|(tuple|literal|function-\w+)\[")
# How its messages begin: "Value error, ", "Input should be", "String should have".
VALUE_ERROR = re.compile(r"^(?:Value error, |Assertion failed, |Invalid JSON: )")
SHOULD = re.compile(r"^[A-Z][\w ]* should\b")

FIELD_FAULTS = {
    "extra_forbidden": "there is no such field",
    "missing": "this field is required",
    "too_short": "at least {min_length} is needed, here are {actual_length}",
    "too_long": "at most {max_length} are allowed",
    "model_attributes_type": "a JSON object is needed",
    "model_type": "a JSON object is needed",
    "bool_type": "true or false is needed",
    "bool_parsing": "true or false is needed",
    "int_type": "a whole number is needed",
    "int_parsing": "a whole number is needed",
    "int_parsing_size": "the number has too many digits",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "float_parsing": "a number is needed",
    "greater_than": "more than {gt} is needed",
    "greater_than_equal": "at least {ge} is needed",
    "less_than": "less than {lt} is needed",
    "less_than_equal": "at most {le} is allowed",
    "string_type": "text is needed",
    "string_too_short": "at least {min_length} characters are needed",
    "string_too_long": "at most {max_length} characters are allowed",
    "dict_type": "a JSON object is needed",
    "list_type": "a JSON list is needed",
    "tuple_type": "a JSON list is needed",
    "byte_size": "it is not a size: write it as 24GB",
    "byte_size_unit": "it is not a size: write it as 24GB",
}


def field_path(location: Sequence[str | int]) -> str:
    """`recipe.bits` of `("recipe", "Recipe", "bits")`, which is where pydantic found a fault."""
    names = [str(step) for step in location if isinstance(step, int) or not BRANCH.match(step)]
    return ".".join(names)


def field_fault(finding: Mapping[str, Any]) -> str:
    """Pydantic's message on a field, or a plainer one where FIELD_FAULTS has it."""
    message = FIELD_FAULTS.get(finding["type"])
    if message is not None:
        return message.format(**finding.get("ctx", {}))
    return SHOULD.sub("it must", VALUE_ERROR.sub("", str(finding["msg"])))


class NibbleError(Exception):
    """An error with a stable code and a remedy."""

    code = "internal"
    passes_by_itself = True  # where the status is one that time may change

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.param = param
        self.retry_after_s = retry_after_s  # where it is known
        if code is not None:
            self.code = code


class InvalidRequest(NibbleError):
    code = "invalid_request"


class MalformedRequest(InvalidRequest):
    code = "malformed_request"


class BodyTooLarge(MalformedRequest):
    code = "body_too_large"


class BodyTooSlow(MalformedRequest):
    code = "body_too_slow"


class RecipeUnsupported(InvalidRequest):
    code = "recipe_unsupported"


class ModelRefused(InvalidRequest):
    code = "model_refused"


class TextRefused(InvalidRequest):
    code = "text_refused"


class Unauthenticated(NibbleError):
    code = "unauthenticated"


class Forbidden(NibbleError):
    code = "forbidden"


class NotFound(NibbleError):
    code = "not_found"


class Conflict(NibbleError):
    code = "conflict"


class PreconditionFailed(NibbleError):
    code = "precondition_failed"


class QueueFull(NibbleError):
    code = "queue_full"


class QuotaExceeded(NibbleError):
    code = "quota_exceeded"


class RateLimited(NibbleError):
    code = "rate_limited"


class Unavailable(NibbleError):
    code = "unavailable"


class Paused(Unavailable):
    """Asking again helps as little as for a name that is not there, until the owner resumes it."""

    code = "deployment_paused"
    passes_by_itself = False


class RecordUnreadable(Unavailable):
    code = "record_unreadable"


class JobFault(NibbleError):
    code = "job_failed"


class WorkerLost(JobFault):
    code = "worker_lost"


class DeadlineExceeded(JobFault):
    code = "deadline_exceeded"


class ChildKilled(JobFault):
    code = "child_killed"


class OutOfMemory(JobFault):
    code = "out_of_memory"


class DeviceFault(JobFault):
    code = "device_failed"


class WorkerDisk(JobFault):
    code = "worker_disk"


class VerificationFailed(JobFault):
    code = "verification_failed"


class TargetMissed(JobFault):
    code = "target_missed"
