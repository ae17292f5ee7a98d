"""The settings of what a line learns from: what guards its examples, and when what comes in has changed.

A part of the tree in `service.settings`, which is where to import from; also what every part of it is made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from replay.guard import Guard

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""What a line, a metric or a key may be called."""

File = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""Where a relative one lies is settled when the settings are read."""
Suite = File
"""A file of golden examples."""


class Closed(BaseModel):
    """A table of settings that refuses strangers."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Admission(Closed):
    """What guards a line's examples."""

    is_guarded: bool = True
    """False: whatever can be learned from is an example, as it was sent."""
    redacts: bool = True
    """Replace e-mail addresses and numbers of people by placeholders, `<EMAIL_1>`; their names are never found."""
    phone_region: str = Field("US", pattern=r"^[A-Z]{2}$")
    """Country whose telephone numbers may be written without `+`."""
    keep: tuple[str, ...] = ()
    """Addresses and numbers that are the house's own, and stay."""
    near_duplicate: float = Field(0.8, gt=0.5, le=1)
    """Questions that share so much of their five words in a row are one question."""
    contamination: float = Field(0.6, gt=0.5, le=1)
    """As much across the held-out split is refused."""
    contamination_words: int = Field(13, ge=0)
    """So are as many words in a row; 0: only the above."""
    window_seconds: float = Field(604_800, gt=0)
    """How far back duplicates and contradictions are looked for, and what counts for the caps on thumbs and pairs."""
    label_words: int = Field(8, ge=0)
    """A reply of so few words is a label, which another contradicts; longer ones are ways of saying it."""
    majority_tenants: int = Field(3, ge=2)
    """Keys that must have spoken before a majority of them counts."""
    principal_share: float = Field(0.01, ge=0, le=1)
    """Share of a job's examples, or of a window's thumbs or pairs, that one principal may give."""
    tenant_share: float = Field(0.2, ge=0, le=1)
    """The same for one key."""
    fair_shares: float = Field(3.0, ge=1)
    """Nobody is held to less than so many equal shares,"""
    min_cap: int = Field(5, ge=1)
    """nor to fewer than so many."""
    trusted: tuple[Name, ...] = ()
    """Keys that no cap holds, and whose word on a question outweighs everybody else's."""
    echo_share: float = Field(0.5, gt=0, le=1)
    """A thumb up is held when so much of the reply stands in the chat before it."""
    max_flips: int = Field(3, ge=1)
    """Thumbs up and down by one principal on more replies than this to one question are held."""

    def guard(self) -> Guard | None:
        """As `replay` has it; None when nothing is guarded."""
        return Guard(**self.model_dump(exclude={"is_guarded"})) if self.is_guarded else None


class Drift(Closed):
    """When what comes in has changed."""

    is_watched: bool = True
    delta: float = Field(0.002, gt=0, lt=1)
    """Chance of a false alarm, shared by the line's detectors (ADWIN's δ)."""
    is_trigger: bool = True
    """Learn when replies have become worse: more thumbs down, or corrections that the champion finds less likely."""
    min_examples: int = Field(100, ge=1)
    """Not with fewer fresh examples than this: a fifth of them is held out, and the gate asks for `min_items`."""
