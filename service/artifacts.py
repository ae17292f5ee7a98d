"""Whether a folder is a version that this daemon may serve: the learners' check, with its refusal in the daemon's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from learners.base import BaseModel
from service.errors import ArtifactInvalid


def validator(base: BaseModel, max_rank: int) -> Callable[[Path], str]:
    """A function from a version's folder to its digest; it raises `ArtifactInvalid` when the folder may not be served."""

    def validate(folder: Path) -> str:
        from learners import artifact  # here, since it brings torch: who never validates starts without it
        from learners.servable import Unservable

        try:
            return artifact.check(folder, base, max_rank)
        except Unservable as error:
            raise ArtifactInvalid(str(error)) from None

    return validate
