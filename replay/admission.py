"""What may be learned from: one interaction and one piece of feedback in, an example or a refusal with its reason out.

Pure. The split is a function of what was asked, so equal questions can never stand on both sides of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from replay.records import Example, Feedback, FeedbackValue, Interaction, asked_digest, split_of

DEMONSTRATION = "demonstration"
"""The metric under which somebody shows the right reply."""
MAX_REPLY_CHARACTERS = 16_384
"""Longer replies are refused: an encoder may cut a prompt from the left, but half a reply teaches to stop half-way."""


class Reason(StrEnum):
    """Why nothing is learned from a piece of feedback."""

    NOT_A_DEMONSTRATION = "not_a_demonstration"
    EMPTY_REPLY = "empty_reply"
    NOT_TRAINABLE = "not_trainable"
    """The client asked with `store: false`."""
    NO_LINE = "no_line"
    """The base was asked by its own name: no line learns from that."""
    NO_PROMPT = "no_prompt"
    """The prompt is not stored any more (erased)."""
    NOT_TEXT = "not_text"
    """The prompt has images, audio or other parts that a text model cannot be trained on."""
    TOO_LONG = "too_long"
    SUPERSEDED = "superseded"
    """A later demonstration for the same interaction stands in its place (decided by the ledger)."""

    # What a line's guard finds (`replay.guard`), which an operator may overrule.
    BAD_TURNS = "bad_turns"
    """A role that no template knows, nobody asked, or the assistant had the last word already."""
    TEMPLATE_MARKERS = "template_markers"
    """The text pretends to be several turns."""
    DUPLICATE = "duplicate"
    """The same question with the same reply was admitted within the window."""
    NEAR_DUPLICATE = "near_duplicate"
    """Nearly the same question, with the same reply."""
    CONTAMINATED = "contaminated"
    """Too like an example on the other side of the held-out split."""
    HARMFUL = "harmful"
    """A job that learned it lost what was learned before (found by training on parts)."""
    CONTRADICTED = "contradicted"
    """Others say otherwise, and there is no majority."""
    OUTVOTED = "outvoted"
    """Most others say otherwise."""
    OVER_PRINCIPAL_CAP = "over_principal_cap"
    """One principal gave more of a job's examples than it may."""
    OVER_TENANT_CAP = "over_tenant_cap"
    """The same for a tenant."""
    ECHO = "echo"
    """A thumb up for a reply that the asker put into the model's mouth."""
    FLIPPED = "flipped"
    """Thumbs up and down by one principal on one question asked again and again."""

    ROLLED_BACK = "rolled_back"
    """Only versions learned it from which the champion does not descend (found by the ledger, `replay.resting`)."""

    # What makes no opinion (`replay.opinions`).
    CUT_OFF = "cut_off"
    """The reply failed, or did not come to its end by itself: it would teach to stop half-way."""
    NO_PAIR = "no_pair"
    """The two replies are the same, or not to the same question, or one of them is not known."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing is learned, and why."""

    reason: Reason


def admit(interaction: Interaction, feedback: Feedback, max_reply_characters: int = MAX_REPLY_CHARACTERS) -> Example | Refusal:
    """Make an example of a demonstration, or say why not."""
    if feedback.metric_name != DEMONSTRATION:
        return Refusal(Reason.NOT_A_DEMONSTRATION)
    reply = _text(feedback.value)
    reason = refusal(interaction, reply, max_reply_characters)
    if reason is not None:
        return Refusal(reason)
    return Example(
        id="ex-" + hashlib.sha256(feedback.id.encode()).hexdigest()[:24],
        interaction_id=interaction.id,
        feedback_id=feedback.id,
        line=interaction.line,
        slice=interaction.slice,
        messages=interaction.messages,
        reply=reply,
        split=split_of(asked_digest(interaction.line, interaction.messages)),
        admitted_at=feedback.received_at,
    )


def refusal(interaction: Interaction, reply: str, max_reply_characters: int = MAX_REPLY_CHARACTERS) -> Reason | None:
    """Why nothing can be learned from this reply to what was asked; None: something can."""
    checks = (
        (Reason.NO_LINE, not interaction.line),
        (Reason.NOT_TRAINABLE, not interaction.is_trainable),
        (Reason.NO_PROMPT, not interaction.messages),
        (Reason.NOT_TEXT, not all(_is_text(message.get("content")) for message in interaction.messages)),
        (Reason.EMPTY_REPLY, not reply.strip()),
        (Reason.TOO_LONG, len(reply) > max_reply_characters),
    )
    return next((reason for reason, is_so in checks if is_so), None)


def _text(value: FeedbackValue) -> str:
    """Read the corrected reply: a string, or a message whose content is a string or a list of text parts."""
    content = value.get("content") if isinstance(value, dict) else value
    if isinstance(content, list) and _is_text(content):
        return "".join(str(part["text"]) for part in content)
    return content if isinstance(content, str) else ""


def _is_text(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in content)
    return content is None or isinstance(content, str)
