"""The tree of errors: each says what went wrong, with which thing, and what to do; `service/api/errors.py` has the codes."""

from __future__ import annotations


class LearndError(Exception):
    """Anything that learnd refuses or fails at, with a message for the user."""

    param: str | None = None
    """The field of the request that is at fault, if one is."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(kind: type[LearndError], message: str, param: str | None) -> LearndError:
    return kind(message, param=param)


class SettingsError(LearndError):
    """The settings cannot be used as they are."""


class InvalidRequest(LearndError):
    """The request is malformed or has a value of the wrong type."""


class NotFound(LearndError):
    """There is no such line, version, feedback, job or trial."""


class Conflict(LearndError):
    """The request contradicts what is stored: the same id with another body, a lost compare-and-set, a second job."""


class Unauthenticated(LearndError):
    """No key, or an unknown one."""


class Forbidden(LearndError):
    """The key lacks the scope."""


class TooLarge(LearndError):
    """The body is over the limit."""


class StorageFailed(LearndError):
    """The ledger could not write: nothing was acknowledged."""


class NotReady(LearndError):
    """The daemon is starting, draining, or lacks a champion that it must hold."""


class ReplyTimeout(LearndError):
    """The engine has not begun its reply in time."""


class DataDirInUse(LearndError):
    """Another daemon owns the data directory."""


class ArtifactInvalid(LearndError):
    """A version's folder is incomplete, corrupted, foreign, or made for another base."""


class EngineCrash(LearndError):
    """A version that replicas died of while they loaded or proved it: it is not tried again by itself."""


class BaseUnavailable(LearndError):
    """The base model cannot be found, prepared, or is not the one that was pinned."""


class WebhookFailed(LearndError):
    """An address did not take a notice."""
