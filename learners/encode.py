"""From chat to tokens: the served template, the loss on the reply and its end alone, batches padded on the left.

Padding on the left lines up the ends of the replies, so that logits are needed for the last few columns only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from replay.records import Message

IGNORED = -100
"""The label of a token that carries no loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example in tokens; `labels` has a token where the loss is, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0

    @property
    def reply_length(self) -> int:
        """Tokens that carry the loss, the end token among them."""
        return sum(label != IGNORED for label in self.labels)


def encode(tokenizer: Any, messages: Sequence[Message], reply: str, max_length: int, weight: float = 1.0) -> Encoded:
    """Render the prompt by the served chat template, then the reply and the end-of-turn token.

    A prompt that is too long loses its beginning; raises `ValueError` when the reply alone does not fit or is empty.
    """
    prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply_ids = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(reply_ids) < 2 or len(reply_ids) >= max_length:  # noqa: PLR2004 - one token and the end
        raise ValueError(f"a reply of {len(reply_ids)} tokens does not fit max_length {max_length}, or is empty")
    prompt_ids = prompt_ids[-(max_length - len(reply_ids)) :]
    return Encoded(prompt_ids + reply_ids, [IGNORED] * len(prompt_ids) + reply_ids, weight)


def collate(examples: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the left: `input_ids`, `attention_mask`, `position_ids`, `labels` (B, L) and `weights` (B)."""
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
    }


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of each reply token in nats, its mask, and whether greedy decoding would choose it: (B, K) each.

    K is the longest reply: only those columns get logits, which over a vocabulary of 49k is most of a small model's work.
    """
    labels = batch["labels"]
    width = int((labels != IGNORED).sum(-1).max())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1].float()
    wanted = labels[:, -width:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return losses, wanted != IGNORED, logits.argmax(-1) == wanted
