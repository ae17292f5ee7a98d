"""EWC on what the factors make together: the Fisher of ΔW = s B A in Kronecker-diagonal form, and its penalty.

    F_ij ≈ g_i x_j        g_i = 1/N · Σ over positions of E[(∂ score / ∂ y_i)²],   x_j = mean over positions of (input j)²
    penalty = κ/(2N) · Σ over layers Σ_ij G_i X_j D_ij²,                          D = s (B A − B* A*)

y are a layer's outputs, the score is the summed loss of labels that the model draws itself, as in `learners/fisher.py`, N the
reply tokens; the expectation of the square of a sum of independent scores is the sum of their squares, so batches do not matter.
That g and x are independent is K-FAC's assumption (Martens and Grosse 2015), diagonals alone are ours. Two vectors a layer, and
(A, B) and (MA, BM⁻¹), one function, cost the same: nothing. D is never formed. With P = [B − B*, B*] and Q = [A; A − A*],

    B A − B* A* = P Q,        Σ_ij G_i X_j (P Q)²_ij = Σ over entries of (Pᵀ diag(G) P) ∘ (Q diag(X) Qᵀ)        both 2r × 2r

in which each term holds a difference, so that nothing is lost to rounding near the anchor. Over versions G ← γ G + n g as with
the factors' Fisher, and X is the mean over the same tokens: a sum of such products is one only if inputs stay alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from learners.encode import Encoded, collate
from learners.ewc import PRODUCT, Inert, Penalty, check_entries
from learners.fisher import sampled_loss

GRADIENTS, INPUTS, TOKENS = ".gradients", ".inputs", f"{PRODUCT}tokens"
BATCH_SIZE = 4
A, B = ".lora_A.weight", ".lora_B.weight"


class ProductPenalty(Penalty):
    """The penalty above, anchored where the factors are when it is made; for the rest as `Penalty`."""

    def __init__(self, factors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], scale: float, s: float) -> None:
        """`scale` is κ/N, `s` the adapter's own. Raises `Inert` when the state is not theirs, is damaged or says nothing."""
        layers = [name.removesuffix(A) for name in factors if name.endswith(A)]
        strays = (state.keys() - {TOKENS}) ^ {f"{PRODUCT}{name}{part}" for name in layers for part in (GRADIENTS, INPUTS)}
        if strays:
            raise Inert(f"ewc_inert: the champion's Fisher is not of these layers: {min(strays)} and others differ")
        check_entries(state)
        self._layers = [self._layer(name, factors, state, scale * s * s) for name in layers]
        if not any(gradients.any() and inputs.any() for *_, gradients, inputs in self._layers):
            raise Inert("ewc_inert: the champion's Fisher is zero everywhere")
        self._seen = []

    def __call__(self) -> torch.Tensor:
        """Its value, with its gradient."""
        parts = [_norm(b, a, b_then, a_then, g, x) for b, a, b_then, a_then, g, x in self._layers]
        return sum(parts[1:], parts[0]) / 2

    def _layer(
        self, name: str, factors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], scale: float
    ) -> tuple[torch.Tensor, ...]:
        a, b = factors[name + A], factors[name + B]
        gradients, inputs = (state[f"{PRODUCT}{name}{part}"].to(a.device) for part in (GRADIENTS, INPUTS))
        if (len(gradients), len(inputs)) != (len(b), a.shape[1]):
            raise Inert(f"ewc_inert: the champion's Fisher is not of these layers: {name} has another shape")
        return b, a, b.detach().clone(), a.detach().clone(), scale * gradients, inputs


def _norm(
    b: torch.Tensor, a: torch.Tensor, b_then: torch.Tensor, a_then: torch.Tensor, g: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Σ_ij g_i x_j (B A − B* A*)²_ij without the product."""
    tall, wide = torch.cat([b - b_then, b_then], 1), torch.cat([a, a - a_then])
    return ((tall.T @ (g[:, None] * tall)) * ((wide * x) @ wide.T)).sum()


def moments(
    model: Any, factors: Mapping[str, torch.Tensor], examples: Sequence[Encoded], pad_id: int, seed: int
) -> dict[str, torch.Tensor]:
    """Of each layer g and x over the reply tokens of `examples`; an example counts by its weight, dropout is off."""
    was_training = model.training
    model.eval()
    names = [name.removesuffix(A) for name in factors if name.endswith(A)]
    layers = {name: model.get_submodule(name) for name in names}
    gradients: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    random, positions = torch.Generator(model.device).manual_seed(seed), 0.0
    for start in range(0, len(examples), BATCH_SIZE):
        batch = {n: t.to(model.device) for n, t in collate(examples[start : start + BATCH_SIZE], pad_id).items()}
        counts = batch["attention_mask"] * batch["weights"][:, None]
        positions += float(counts.sum())
        with _watched(layers) as seen:
            score = sampled_loss(model, batch, random)
        found = torch.autograd.grad(score, [seen[name][1] for name in names])
        for name, gradient in zip(names, found, strict=True):
            squares = counts[..., None] * seen[name][0].float().square()
            gradients[name] = gradients.get(name, torch.zeros(())) + gradient.float().square().sum((0, 1))
            inputs[name] = inputs.get(name, torch.zeros(())) + squares.sum((0, 1))
    model.train(was_training)
    tokens = max(sum(e.reply_length for e in examples), 1)
    told = {f"{PRODUCT}{name}{GRADIENTS}": total / tokens for name, total in gradients.items()}
    return told | {f"{PRODUCT}{name}{INPUTS}": total / positions for name, total in inputs.items()}


def joined(
    old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], tokens: int, gamma: float
) -> dict[str, torch.Tensor]:
    """What a version leaves: the old G faded and the new one for its tokens, X their mean, and for how many tokens both stand."""
    before = gamma * float(old[TOKENS]) if old else 0.0
    share = tokens / (before + tokens) if before + tokens else 0.0
    left = {TOKENS: torch.tensor(before + tokens)}
    for name in sorted((old.keys() | new.keys()) - {TOKENS}):
        then, now = (part[name].cpu() if name in part else torch.zeros(()) for part in (old, new))
        left[name] = (1 - share) * then + share * now if name.endswith(INPUTS) else gamma * then + tokens * now
    return left


@contextmanager
def _watched(layers: Mapping[str, Any]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs and outputs of layers while the context lasts, by their names."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = (given[0].detach(), output)

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
