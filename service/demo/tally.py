"""What the demo measured: every reply and failure, and accuracies from them. Pure; customers write, the rest reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.demo.plan import BASE
from service.demo.texts import Text


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer as a customer saw it."""

    id: str
    text: Text
    content: str
    model: str
    """The version that answered, by the reply's own `model`."""
    at: float
    """Seconds since the demo began."""
    is_by_name: bool = False
    """The base was asked by its own name, to compare: not part of the line's traffic."""

    @property
    def is_right(self) -> bool:
        """Whether the answer starts with the right label."""
        return self.text.is_answered_by(self.content)

    @property
    def version(self) -> str:
        """`v1`, `v2`…, or `base`."""
        return "base" if self.model == BASE else self.model.partition("@")[2]


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers among distinct never-trained texts."""

    right: int = 0
    asked: int = 0

    @property
    def accuracy(self) -> float | None:
        """None when nothing was asked."""
        return self.right / self.asked if self.asked else None


@dataclass(slots=True)
class Tally:
    """All replies and failures, and the scores kept as they come."""

    replies: list[Reply] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    _counted: set[tuple[str, str, str]] = field(default_factory=set)

    @property
    def requests(self) -> int:
        """Requests sent, failed ones included."""
        return len(self.replies) + len(self.failures)

    def add(self, reply: Reply) -> None:
        """Count a reply; a version's first answer to a never-trained text counts for its accuracy."""
        self.replies.append(reply)
        key = (reply.text.skill, reply.version, reply.text.fingerprint)
        if reply.text.is_taught or key in self._counted:
            return
        self._counted.add(key)
        old = self.score(reply.text.skill, reply.version)
        self._scores[reply.text.skill, reply.version] = Score(old.right + reply.is_right, old.asked + 1)

    def fail(self, why: str) -> None:
        """Count a request without an answer."""
        self.failures.append(why)

    def score(self, skill: str, version: str) -> Score:
        """How well a version does a skill."""
        return self._scores.get((skill, version), Score())

    def versions(self) -> list[str]:
        """The versions that answered never-trained texts, the base first."""
        seen = {version for _, version in self._scores}
        return sorted(seen, key=lambda v: (v != "base", int(v[1:]) if v[1:].isdigit() else 0))

    def matrix(self) -> dict[str, dict[str, Score]]:
        """Skills by versions."""
        skills = list(dict.fromkeys(skill for skill, _ in self._scores))
        return {skill: {version: self.score(skill, version) for version in self.versions()} for skill in skills}
