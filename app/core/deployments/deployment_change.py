"""The body of `PATCH /v1/deployments/{id}`, and what it makes of a record."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from app.core.deployments.deployment import ArtifactId, Deployment, DeploymentSpec, Served
from app.core.deployments.transitions import (
    paused,
    replaced,
    require_present,
    resumed,
    scaled,
    with_changes,
)
from app.core.errors import InvalidRequest, field_fault, field_path
from app.core.records.serving_options import (
    STRICT,
    Aliases,
    CacheShare,
    Dtype,
    Engine,
    IdleSeconds,
    ReplicaCount,
    Sequences,
    Tokens,
    VllmOptions,
)
from app.core.records.specs import Frozen

# Where null is a value: the default.
NULLABLE = ("idle_timeout_s", "dtype", "max_model_len", "max_num_seqs", "cache_share", "vllm")


class DeploymentChange(Frozen):
    """The fields to change; the others stay. `artifact` and what follows it replace the servers."""

    model_config = ConfigDict(**STRICT, json_schema_extra={"minProperties": 1})

    replicas: ReplicaCount | None = None
    paused: bool | None = Field(default=None, description="true: stop; false: start again, also what failed")
    aliases: Aliases | None = Field(default=None, description="All further names.")
    idle_timeout_s: IdleSeconds | None = Field(default=None, description="null: never unloaded.")
    artifact: ArtifactId | None = Field(default=None, description="What replaces the present one.")
    original: bool | None = Field(
        default=None, description="true: serve the model that the artifact was made of; false: the artifact."
    )
    engine: Engine | None = None
    dtype: Dtype | None = None
    max_model_len: Tokens | None = None
    max_num_seqs: Sequences | None = None
    cache_share: CacheShare | None = None
    vllm: VllmOptions | None = None

    @model_validator(mode="after")
    def has_a_change(self) -> Self:
        if not self.present:
            raise ValueError("give at least one field to change")
        return self

    @property
    def present(self) -> dict[str, object]:
        """The fields that are to change."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value
            for name, value in values.items()
            if value is not None or (name in NULLABLE and name in self.model_fields_set)
        }

    def served(self, deployment: Deployment) -> Served | None:
        """What its servers are to be started with; None if that does not change.

        Raises InvalidRequest for options that don't go together.
        """
        changes = {name: value for name, value in self.present.items() if name in Served.model_fields}
        if not changes:
            return None
        incoming = deployment.incoming
        target = deployment.spec.served if incoming is None else incoming.served
        fields = {name: getattr(target, name) for name in Served.model_fields}
        try:
            return Served(**{**fields, **changes})
        except ValidationError as fault:
            raise misfit(fault) from fault

    def applied_to(self, deployment: Deployment) -> Deployment:
        """The record after the change. Raises Conflict if it is deleted, InvalidRequest for a misfit."""
        require_present(deployment)
        served, after = self.served(deployment), deployment
        if self.replicas is not None:
            after = scaled(after, self.replicas)
        after = with_changes(after, spec=self._named(after.spec))
        if self.paused:
            after = paused(after)
        if served is not None:
            after = replaced(after, served)
        if self.paused is False:
            after = resumed(after)
        return after if after == deployment else with_changes(after, revision=deployment.revision + 1)

    def _named(self, spec: DeploymentSpec) -> DeploymentSpec:
        """The spec with other aliases and another time of idleness."""
        fields = {name: self.present[name] for name in ("aliases", "idle_timeout_s") if name in self.present}
        try:
            return DeploymentSpec.model_validate({**spec.model_dump(), **fields})
        except ValidationError as fault:
            raise misfit(fault) from fault


def misfit(fault: ValidationError) -> InvalidRequest:
    finding = fault.errors()[0]
    is_of_one = finding["loc"] == ("aliases",)  # else two fields do not go together
    return InvalidRequest(
        field_fault(finding),
        code="validation_failed",
        remedy="name each once, or leave it out"
        if is_of_one
        else "change both fields at once, or leave one out; null takes an option back",
        param=field_path(finding["loc"]) or None,
    )
