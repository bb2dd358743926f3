"""Files that a clone without git-lfs leaves in place of large ones: a few lines that name the contents.

Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

from app.core.errors import ModelRefused

POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024
REMEDY = "run `git lfs pull` where it was cloned, or download the file from the hub"


def is_pointer(content: bytes) -> bool:
    return content.startswith(POINTER)


def refuse_pointer(path: str, content: bytes) -> None:
    """Raises ModelRefused if a file of a model, of which `content` is the beginning, is only a pointer."""
    if is_pointer(content):
        raise ModelRefused(
            f"{path} is a git-lfs pointer, not the file itself",
            code="git_lfs_pointer",
            remedy=REMEDY,
            param="model",
        )
