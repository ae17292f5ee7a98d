"""How long a reply may be waited for, and what it must be made of.

A part of the tree in `service.settings`, which is where to import from.
"""

from __future__ import annotations

from pydantic import Field

from service.settings_data import Closed


class Deadlines(Closed):
    """What is too long, in seconds: an engine that hangs is to be told from one that is slow."""

    first_token_seconds: float = Field(60, ge=0)
    """A stream without a token is ended then: 504, a failed reply of its version. 0: never."""
    whole_reply_seconds: float = Field(600, ge=0)
    """The same of a reply that comes whole, whose first token nobody sees: as long as OpenAI's clients wait. 0: never."""
    patience_seconds: float = Field(10, ge=0)
    """A client that leaves after so long without a token was failed (`timeout`); sooner, it has changed its mind. 0: always."""


class Replies(Deadlines):
    """What a reply must be to count as one."""

    checks_logits: bool = True
    """Logits that are no numbers (NaN) break a reply off: a failed reply of its version, in place of tokens that mean nothing."""
