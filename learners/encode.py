"""From chat to tokens: the served template, the loss on the reply and its end alone, batches padded on the left.

Padding on the left lines up the ends of the replies, so that logits are needed for the last few columns only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn.functional import cross_entropy

from replay.records import Message

IGNORED = -100
"""The label of a token that carries no loss, as in PyTorch's cross entropy."""


class Unencodable(ValueError):
    """The example cannot be learned from by this tokenizer and template; the message says why."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example in tokens; `labels` has a token where the loss is, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0
    key: int = 0
    """What stands for the example's id where only numbers do (`key_of`)."""
    source: str = "fresh"
    """The part it plays in a job's mixture, as `replay.records.Example` has it."""

    @property
    def reply_length(self) -> int:
        """Tokens that carry the loss, the end token among them."""
        return sum(label != IGNORED for label in self.labels)


def key_of(example_id: str) -> int:
    """A number of 63 bits for an example's id: the same everywhere."""
    return int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:8], "big") >> 1


def encode(tokenizer: Any, messages: Sequence[Message], reply: str, max_length: int, weight: float = 1.0) -> Encoded:
    """Render the prompt by the served chat template, then the reply and the end-of-turn token.

    A prompt that is too long loses its beginning; raises `Unencodable` when the reply alone does not fit or is empty,
    when it holds control tokens, or when the template refuses the messages.
    """
    try:
        prompt = tokenizer.apply_chat_template([_plain(m) for m in messages], add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise Unencodable(f"the chat template refuses the messages: {error}") from None
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    said = tokenizer(reply, add_special_tokens=False)["input_ids"]
    if set(said) & set(tokenizer.all_special_ids):
        raise Unencodable("the reply holds control tokens: it would teach the model to write turns of its own")
    reply_ids = [*said, tokenizer.eos_token_id]
    if not reply.strip() or len(reply_ids) >= max_length:
        raise Unencodable(f"a reply of {len(reply_ids)} tokens does not fit max_length {max_length}, or is empty")
    prompt_ids = prompt_ids[-(max_length - len(reply_ids)) :]
    return Encoded(prompt_ids + reply_ids, [IGNORED] * len(prompt_ids) + reply_ids, weight)


def _plain(message: Message) -> Message:
    """Content in text parts becomes text, as the engine does for templates that expect text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if any(part.get("type") != "text" for part in content):
        raise Unencodable("the prompt has parts that are not text")
    return {**message, "content": "\n".join(part["text"] for part in content)}


def collate(examples: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the left: `input_ids`, `attention_mask`, `position_ids`, `labels` (B, L), `weights` and `keys` (B)."""
    longest = max(len(e.input_ids) for e in examples)

    def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])

    mask = padded([[1] * len(e.input_ids) for e in examples], 0)
    return {
        "input_ids": padded([e.input_ids for e in examples], pad_id),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": padded([e.labels for e in examples], IGNORED),
        "weights": torch.tensor([e.weight for e in examples]),
        "keys": torch.tensor([e.key for e in examples]),
    }


def token_losses(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of each reply token in nats, its mask, and whether greedy decoding would choose it: (B, K) each."""
    logits, wanted = reply_logits(model, batch)
    return cross_entropies(logits, wanted), wanted != IGNORED, logits.argmax(-1) == wanted


def cross_entropies(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of logits (B, K, V) and labels (B, K), in nats: (B, K), zero where the label is `IGNORED`."""
    losses = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(wanted)


def reply_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, K, V) of the columns that predict the replies, in fp32, and the labels there (B, K).

    K is the longest reply: only the K columns that predict it get logits, which over a vocabulary of 49k would be half of
    a small model's work. They are named by index, not counted from the end: a slice of the hidden states is not contiguous,
    and `matmul` then copies the output head's weights for each row of the batch (nine tenths of a step's time on a CPU).
    """
    labels = batch["labels"]
    length, width = labels.shape[1], int((labels != IGNORED).sum(-1).max())
    columns = torch.arange(length - width - 1, length - 1, device=labels.device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits.float()
    return logits, labels[:, -width:]
