"""The diagonal of the Fisher information, by labels that the model draws itself. The estimator alone.

    F̂ᵢ = 1/N · Σ over tokens t of E[(∂ log p(y | x, t) / ∂θᵢ)²],  y ~ p(· | x, t)         per reply token, N of them

The gradient's mean over labels that the model draws is zero at each token, whatever the others drew. So the cross terms of a
batch vanish in expectation, and the square of its *summed* gradient, B² times its mean gradient's, estimates the sum of the
squares without bias at any batch size: the Gauss-Newton-Bartlett estimator (Martens 2020; Liu et al. 2024, "Sophia"). An
entry's relative standard deviation is about √(2 / batches), so many small batches are better than few large ones.

Two variants in public code are other numbers: the square of a batch's mean gradient is B times too small; labels from the data
(the "empirical Fisher") are right only where the model fits them already (van de Ven 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from learners.encode import IGNORED, Encoded, collate, reply_logits

BATCH_SIZE = 4


def fisher(
    model: Any,
    parameters: Mapping[str, torch.Tensor],
    examples: Sequence[Encoded],
    pad_id: int,
    seed: int,
    batch_size: int = BATCH_SIZE,
) -> dict[str, torch.Tensor]:
    """F̂ of each parameter, in its shape, over the reply tokens of `examples`; an example counts by its weight, as in the loss.

    Dropout is off; the model is left in the mode it was in, its gradients untouched.
    """
    was_training = model.training
    model.eval()
    found = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    random = torch.Generator(model.device).manual_seed(seed)
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_id)
        score = sampled_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, random)
        gradients = torch.autograd.grad(score, list(parameters.values()), materialize_grads=True)
        for total, gradient in zip(found.values(), gradients, strict=True):
            total.addcmul_(gradient.float(), gradient.float())
    model.train(was_training)
    tokens = sum(e.reply_length for e in examples)
    return {name: total / max(tokens, 1) for name, total in found.items()}


def sampled_loss(model: Any, batch: Mapping[str, torch.Tensor], random: torch.Generator) -> torch.Tensor:
    """The summed loss of labels drawn at each reply token after the tokens that were really there; w weighs its square."""
    logits, wanted = reply_logits(model, batch)
    drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1, generator=random).view_as(wanted)
    losses = cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="none").view_as(wanted)
    return (losses * (wanted != IGNORED) * batch["weights"].sqrt()[:, None]).sum()
