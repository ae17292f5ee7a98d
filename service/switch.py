"""The kill switch: how far the daemon may go by itself, for all lines at once. Stored, so that it outlives the daemon.

Each position holds back what the one before does, and more. What takes a candidate out of the traffic always goes on. Of the
setting and of what somebody has thrown, the stricter holds: a file cannot undo in silence what a person did in an emergency.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Column, Connection, Float, Integer, String, Table, delete, insert, select

from service.errors import Conflict
from service.registry import bump, metadata
from service.settings import SwitchMode

MODES: tuple[SwitchMode, ...] = ("off", "freeze_promotion", "freeze_training", "base_only")
"""From nothing to everything that is held back."""
EVERYWHERE = ""
"""The line that its records in the audit log stand under: none in particular."""

_switch = Table(
    "switch",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("mode", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("at", Float, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Switch:
    """Where the switch stands."""

    mode: SwitchMode = "off"
    """What holds: the stricter of the two."""
    thrown: SwitchMode = "off"
    """By a person, over API or command line."""
    set: SwitchMode = "off"
    """By the settings."""
    reason: str = ""
    at: float | None = None

    def holds_back(self, mode: SwitchMode) -> bool:
        """Whether it stands at `mode` or further."""
        return MODES.index(self.mode) >= MODES.index(mode)

    def as_json(self) -> dict[str, Any]:
        """As status and API show it."""
        return asdict(self)


def read(conn: Connection, setting: SwitchMode) -> Switch:
    """Where it stands now."""
    row = conn.execute(select(_switch)).mappings().one_or_none()
    if row is None:
        return Switch(setting, "off", setting)
    thrown: SwitchMode = row["mode"]
    return Switch(max(thrown, setting, key=MODES.index), thrown, setting, row["reason"], row["at"])


def check(conn: Connection, setting: SwitchMode, mode: SwitchMode) -> None:
    """Raise `Conflict` when it holds back what `mode` does: a person asked for it, and is to throw the switch back first."""
    found = read(conn, setting)
    if found.holds_back(mode):
        how = "`learnd switch off`" if found.thrown != "off" else "the setting `kill_switch`"
        raise Conflict(f"the kill switch is on {found.mode}: nothing of the kind is done before it is off again ({how})")


def throw(conn: Connection, mode: SwitchMode, reason: str, now: float) -> None:
    """Put it where a person wants it."""
    conn.execute(delete(_switch))
    conn.execute(insert(_switch).values(id=1, mode=mode, reason=reason, at=now))
    bump(conn)
