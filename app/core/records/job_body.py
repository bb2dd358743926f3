"""What callers send beside the body of a job, and no record holds."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from app.core.records.specs import Frozen, JobSpec, PushOptions, TimeoutSeconds

MAX_TOKEN = 512


def usable_token(token: SecretStr) -> SecretStr:
    """Raises ValueError, without naming it, for what can't be a header's value."""
    secret = token.get_secret_value()
    if not 0 < len(secret) <= MAX_TOKEN or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ValueError(f"a hub token has 1 to {MAX_TOKEN} printable ASCII characters without spaces")
    return token


HubToken = Annotated[
    SecretStr,
    AfterValidator(usable_token),
    Field(
        description="Of the hub: reads the job's sources, and pushes. It is in no record and no answer.",
        json_schema_extra={"pattern": r"^[!-~]{1,512}$"},
    ),
]


class RetryBody(Frozen):
    """The optional body of a retry: the token, which is not kept, and what replaces fields of the spec."""

    hub_token: HubToken | None = None
    timeout_s: TimeoutSeconds | None = None
    force: bool | None = None  # compute again even if the result exists

    def applied_to(self, spec: JobSpec) -> JobSpec:
        """The spec with what this body replaces."""
        return spec.model_copy(update=self.model_dump(include={"timeout_s", "force"}, exclude_none=True))


class JobSubmission(JobSpec):
    """The body of `POST /v1/jobs`: the job, and what it is not recorded with."""

    hub_token: HubToken | None = None

    @property
    def spec(self) -> JobSpec:
        """The job alone."""
        fields = {name: getattr(self, name) for name in JobSpec.model_fields}
        return JobSpec.model_construct(self.model_fields_set - {"hub_token"}, **fields)


class PushBody(PushOptions):
    """The body of `POST /v1/artifacts/{id}/push`."""

    hub_token: HubToken | None = None

    @property
    def options(self) -> PushOptions:
        """The push alone."""
        return PushOptions.model_validate(self.model_dump(exclude={"hub_token"}))
