"""Dark knowledge: what a version thinks of each reply token of an example, kept small, and how far a model is from it.

Of each token the `TOP` likeliest ones are kept with their log-probabilities, and one more bucket with the log of all the rest's
mass. With q the kept ones, which are made to sum to one again, and p the model's mass in the same buckets,

    KL(q ‖ p) = Σ over 65 buckets of q (log q − log p)                          nats per reply token

By the chain rule it is the full divergence less what happens within the rest, weighted by the rest's mass: never more than the
full one, and all of it where the rest is a single token. Without the rest's bucket it would be blind to mass that leaves the
top, and the top's masses would not be a distribution. Probabilities do not change when all logits move by the same amount;
logits, which the papers compare, do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from learners.encode import Encoded, collate, reply_logits
from learners.ewc import Inert

TOP = 64
BATCH_SIZE = 8
LEAST = -1e4
"""The log of a mass that is nil in every precision, where half precision would say minus infinity."""

KEYS, LENGTHS, TOKENS, LOGS = "dark.keys", "dark.lengths", "dark.tokens", "dark.logprobs"
"""What is kept of E examples with T reply tokens in all: the examples' keys and numbers of tokens (E), in the keys' order;
tokens (T, 64) and log-probabilities (T, 65), the rest's last. 386 bytes a token."""


def buckets(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens (T, k) of logits (T, V) and the logs of their masses and of the rest's (T, k + 1)."""
    tokens = logits.topk(min(TOP, logits.shape[-1] - 1)).indices
    return tokens, masses(logits, tokens)


def masses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logs of the masses that logits (T, V) give to tokens (T, k), and of the rest's mass last: (T, k + 1).

    The rest's is a sum over the rest: one less the top's sum would be rounding where the model is sure.
    """
    named = logits.gather(-1, tokens)
    rest = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([named, rest], -1).log_softmax(-1)


def divergence(logits: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """KL of what was kept (T, k + 1) from the model's logits (T, V) over the buckets, in nats a token: (T)."""
    known = kept.float().log_softmax(-1)
    return (known.exp() * (known - masses(logits, tokens))).sum(-1)


@torch.no_grad()
def look(model: Any, examples: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """What the model thinks of each reply token of the examples; dropout off, the model left in the mode it was in."""
    was_training = model.training
    model.eval()
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for start in range(0, len(ordered), BATCH_SIZE):
        batch = ordered[start : start + BATCH_SIZE]
        logits, _ = reply_logits(model, {n: t.to(model.device) for n, t in collate(batch, pad_id).items()})
        for example, row in zip(batch, logits, strict=True):
            tokens, logs = buckets(row[-example.reply_length :])
            found[example.key] = tokens.int().cpu(), logs.clamp(min=LEAST).half().cpu()
    model.train(was_training)
    return _packed(found)


def joined(
    old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], kept: Collection[int] | None
) -> dict[str, torch.Tensor]:
    """Both, the new one where both know an example; of the examples with these keys alone, None being all."""
    found = {**_unpacked(old), **_unpacked(new)}
    return _packed({key: one for key, one in found.items() if kept is None or key in kept})


class Distillation:
    """What stands in the place of a remembered token's loss: β times its cross entropy + α times its divergence."""

    def __init__(self, known: Mapping[str, torch.Tensor], remembered: Sequence[Encoded], alpha: float, beta: float) -> None:
        """Of those remembered examples that `known` has something of; the others' losses stay as they are.

        Raises `Inert` when what is known of them is of replies of other lengths throughout: then something is damaged.
        """
        lengths, found = {e.key: e.reply_length for e in remembered}, _unpacked(known)
        self._known = {key: one for key, one in found.items() if lengths.get(key) == len(one[0])}
        if alpha and not self._known and lengths.keys() & found.keys():
            raise Inert("der_inert: what the champion left of the remembered examples is of other replies than theirs")
        self._remembered = len(lengths)
        self._alpha, self._beta = alpha, beta
        self._seen: list[torch.Tensor] = []

    def __call__(self, losses: torch.Tensor, logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The losses (B, K) of a batch of examples with these keys (B), whose replies end at the last column."""
        here = [(row, self._known[key]) for row, key in enumerate(keys.tolist()) if key in self._known]
        if not here:
            return losses
        rows = torch.cat([torch.full((len(tokens),), row) for row, (tokens, _) in here]).to(losses.device)
        columns = torch.cat([torch.arange(-len(tokens), 0) for _, (tokens, _) in here]).to(losses.device) + losses.shape[1]
        tokens, kept = (torch.cat([known[part] for _, known in here]).to(losses.device) for part in (0, 1))
        apart = divergence(logits[rows, columns], tokens.long(), kept)
        self._seen.append(apart.detach().mean())
        return losses.index_put((rows, columns), self._beta * losses[rows, columns] + self._alpha * apart)

    def outcome(self) -> dict[str, Any]:
        """What it came to, with a warning when it had nothing to hold; raises `Inert` when it never was anything but zero.

        That the champion knew none of what was drawn is no fault: its line may just have changed its strategy.
        """
        seen = [float(one) for one in self._seen]
        if seen and self._alpha and not any(seen):
            raise Inert("der_inert: the divergence from what was remembered was exactly zero throughout")
        told: dict[str, Any] = {"distilled_examples": len(self._known), "divergence": sum(seen) / max(len(seen), 1)}
        if self._alpha and not self._known:
            told["warning"] = (
                f"der_faint: the champion left nothing of the {self._remembered} remembered examples: they were rehearsed alone"
            )
        return told


def _packed(found: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if not found:
        return {}
    keys = sorted(found)
    return {
        KEYS: torch.tensor(keys),
        LENGTHS: torch.tensor([len(found[key][0]) for key in keys], dtype=torch.int32),
        TOKENS: torch.cat([found[key][0] for key in keys]),
        LOGS: torch.cat([found[key][1] for key in keys]),
    }


def _unpacked(known: Mapping[str, torch.Tensor]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    if not known:
        return {}
    parts = (torch.split(known[name], known[LENGTHS].tolist()) for name in (TOKENS, LOGS))
    return dict(zip(known[KEYS].tolist(), zip(*parts, strict=True), strict=True))
