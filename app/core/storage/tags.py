"""Tags of artifacts: within a tenant, `<model>@<tag>` points to one artifact, and moves in one step.

nibble:tags:<tenant>    hash from `<model>@<tag>` to an artifact's id

The model is the source that was quantized, without its revision: all its versions share the tags.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from redis import Redis

from app.core.changes.atomic_changes import Script
from app.core.changes.redis_keys import tags_key
from app.core.errors import Conflict, NotFound
from app.core.records.artifact import ArtifactManifest
from app.core.records.forms import Form
from app.core.records.specs import Frozen

TAG = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MOST = 32  # of one artifact

TagName = Annotated[
    str, Form(rf"^{TAG}$", "a tag: at most 64 letters, digits and . _ -, the first a letter or a digit")
]

# For each tag that it gives: the artifact it pointed to before. What is removed must point to this artifact.
CHANGE = Script(
    keys=("tags",),
    args=(
        "artifact",
        "added",
        "removed",
        "rest",
    ),  # JSON lists of fields; rest: '1' to remove all others of it
    body="""
local moved = {}
local stays = {}
for _, field in ipairs(cjson.decode(added)) do
  stays[field] = true
  local before = redis.call('HGET', tags, field)
  if before ~= artifact then
    redis.call('HSET', tags, field, artifact)
    table.insert(moved, {field, before or '', artifact})
  end
end
local function drop(field)
  if not stays[field] and redis.call('HGET', tags, field) == artifact then
    redis.call('HDEL', tags, field)
    table.insert(moved, {field, artifact, ''})
  end
end
for _, field in ipairs(cjson.decode(removed)) do drop(field) end
if rest == '1' then
  local all = redis.call('HGETALL', tags)
  for index = 1, #all, 2 do
    if all[index + 1] == artifact then drop(all[index]) end
  end
end
return moved
""",
)


class TagMove(Frozen):
    """A tag that points elsewhere now; None: nowhere."""

    tag: str  # <model>@<tag>
    before: str | None
    after: str | None

    @property
    def text(self) -> str:
        return f"{self.tag}: {self.before or 'none'} -> {self.after or 'none'}"


def model_name(reference: str) -> str:
    """What versions of a model share: `org/name` of a hub repository at any revision, else the reference."""
    if reference.startswith("hf:"):
        return reference.removeprefix("hf:").partition("@")[0]
    return reference


class Tags:
    """The tags of each tenant's artifacts."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # Any: redis-py types each answer as possibly awaitable
        self._change = CHANGE.on(redis)

    def change(
        self,
        manifest: ArtifactManifest,
        *,
        added: Collection[str] = (),
        removed: Collection[str] = (),
        only: bool = False,
    ) -> tuple[TagMove, ...]:
        """Point `added` to the artifact and take `removed` from it, with `only` all others too; what moved.

        Raises Conflict beyond MOST tags of the artifact.
        """
        if len(set(added) if only else self.of(manifest) | set(added)) > MOST:
            raise too_many(manifest)
        name = model_name(manifest.model)
        moves = self._change(
            tags=tags_key(manifest.tenant),
            artifact=manifest.id,
            added=json.dumps([f"{name}@{tag}" for tag in added]),
            removed=json.dumps([f"{name}@{tag}" for tag in removed]),
            rest=int(only),
        )
        return tuple(
            TagMove(tag=field.decode(), before=before.decode() or None, after=after.decode() or None)
            for field, before, after in moves
        )

    def by_artifact(self, tenant: str) -> Mapping[str, tuple[str, ...]]:
        """The tags of every artifact that has some, sorted."""
        pointed: dict[str, list[str]] = {}
        for field, artifact in self._redis.hgetall(tags_key(tenant)).items():
            pointed.setdefault(artifact.decode(), []).append(field.decode().rpartition("@")[2])
        return {artifact: tuple(sorted(tags)) for artifact, tags in pointed.items()}

    def of(self, manifest: ArtifactManifest) -> set[str]:
        return set(self.by_artifact(manifest.tenant).get(manifest.id, ()))

    def resolve(self, tenant: str, name: str) -> str:
        """The artifact that `<model>@<tag>` points to. Raises NotFound."""
        artifact = self._redis.hget(tags_key(tenant), name)
        if artifact is None:
            raise NotFound(
                f"no artifact has the tag {name[:300]}",
                code="tag_not_found",
                remedy="`nibble registry` and GET /v1/registry list models with their tags",
            )
        return str(artifact.decode())

    def forget(self, manifest: ArtifactManifest) -> tuple[TagMove, ...]:
        """Take all tags from an artifact that is removed."""
        return self.change(manifest, only=True)


def too_many(manifest: ArtifactManifest) -> Conflict:
    return Conflict(
        f"artifact {manifest.id} would have more than {MOST} tags",
        code="too_many_tags",
        remedy="remove some that nobody uses",
    )
