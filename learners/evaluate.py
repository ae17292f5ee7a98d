"""Scores on held-out examples, by one forward pass each: how likely the wanted reply is, and whether greedy decoding gives it.

Beside them, how far one model is from another: the KL divergence on neutral texts, and how long its replies are.

Teacher forcing decides exactness without generating: greedy decoding yields a reply, token by token, if and only if every
token of it (the end token too) is the most likely one after the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from learners.encode import IGNORED, Encoded, collate, token_losses


@dataclass(frozen=True, slots=True)
class Scores:
    """By example, in the order given."""

    exact: list[float]
    """1 when greedy decoding gives the reply, else 0."""
    loglik: list[float]
    """Mean log-probability of the reply's tokens, in nats."""

    def as_json(self) -> dict[str, list[float]]:
        """As `evaluation.json` has it."""
        return {"exact": self.exact, "loglik": self.loglik}


@torch.no_grad()
def score(model: Any, examples: Sequence[Encoded], pad_id: int, batch_size: int = 16) -> Scores:
    """Score each example; batches are of like length, the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    exact, loglik = [0.0] * len(examples), [0.0] * len(examples)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in collate([examples[i] for i in rows], pad_id).items()}
        losses, mask, is_best = token_losses(model, batch)
        sums, counts = (losses * mask).sum(-1), mask.sum(-1)
        for row, total, count, right in zip(
            rows, sums.tolist(), counts.tolist(), (is_best | ~mask).all(-1).tolist(), strict=True
        ):
            exact[row], loglik[row] = float(right), -total / count
    model.train(was_training)
    return Scores(exact, loglik)


@torch.no_grad()
def logprobs(model: Any, token_ids: Sequence[int]) -> list[float]:
    """Log-probability of each token after the first, in nats: what a version's fingerprint holds."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([list(token_ids)], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    model.train(was_training)
    return [float(value) for value in found]


@torch.no_grad()
def distributions(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probs over the vocabulary after each token of each text but its last, in nats and fp32: (tokens, V)."""
    was_training = model.training
    model.eval()
    rows = [model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0, :-1] for ids in texts]
    model.train(was_training)
    return torch.cat(rows).float().log_softmax(-1).cpu()


def divergence(candidate: torch.Tensor, champion: torch.Tensor) -> float:
    """KL(candidate || champion), the mean over positions, in nats; log-probs (tokens, V) each.

    What the candidate says, surprises the champion by so much more than itself: the divergence that RLHF holds down.
    """
    return float((candidate.exp() * (candidate - champion)).sum(-1).mean().clamp(min=0))


@torch.no_grad()
def reply_lengths(
    model: Any, examples: Sequence[Encoded], pad_id: int, end_id: int, most: int, batch_size: int = 16
) -> list[int]:
    """Tokens of each greedy reply to the examples' prompts, the end token not counted, `most` at the most."""
    was_training = model.training
    model.eval()
    prompts = [[token for token, label in zip(e.input_ids, e.labels, strict=True) if label == IGNORED] for e in examples]
    found: list[int] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        found += _greedy_lengths(model, ids, mask, end_id, most)
    model.train(was_training)
    return found


def _greedy_lengths(model: Any, ids: torch.Tensor, mask: torch.Tensor, end_id: int, most: int) -> list[int]:
    """One batch, padded on the left, decoded step by step with its cache."""
    lengths, is_open, cache = torch.zeros(len(ids), dtype=torch.long), torch.ones(len(ids), dtype=torch.bool), None
    for _ in range(most):
        places = mask.cumsum(-1)[:, -ids.shape[1] :] - 1
        said = model(input_ids=ids, attention_mask=mask, position_ids=places.clamp(min=0), past_key_values=cache, use_cache=True)
        cache, ids = said.past_key_values, said.logits[:, -1:].argmax(-1)
        is_open &= (ids[:, 0] != end_id).cpu()
        if not is_open.any():
            break
        lengths += is_open
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return [int(length) for length in lengths]
