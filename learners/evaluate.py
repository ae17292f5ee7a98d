"""Scores on held-out examples, by one forward pass each: how likely the wanted reply is, and whether greedy decoding gives it.

Teacher forcing decides exactness without generating: greedy decoding yields a reply, token by token, if and only if every
token of it (the end token too) is the most likely one after the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from learners.encode import Encoded, collate, token_losses


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
