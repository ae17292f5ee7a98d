"""Sums of low-rank updates: their input directions, how far two overlap, and the best update of a lower rank. Pure.

An update is ΔW = s B A with A (rank, inputs) and B (outputs, rank). It reads inputs by A's rows alone, so two updates whose
rows are orthogonal do not read the same directions. The sum of two with the same s is that of the concatenated factors,

    B A + B' A' = [B  B'] [A; A']                        ranks add up; (B + B')(A + A') would be another matrix

and the nearest one of a lower rank keeps the largest singular values (Eckart and Young 1936). They come from two QR
factorisations and the decomposition of a matrix as small as the rank; the product itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from learners.ewc import Inert


def basis(a: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span the rows of A (rank, inputs), whatever its scale; of as many rows as its rank is."""
    _, values, directions = torch.linalg.svd(a.detach().double(), full_matrices=False)
    is_there = values > values.max() * max(a.shape) * torch.finfo(a.dtype).eps
    found: torch.Tensor = directions[is_there].to(a.dtype)
    return found


def truncated(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The factors of the best approximation of B A of a rank, of equal norms, and all singular values, largest first."""
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    roots = torch.zeros(rank, dtype=values.dtype, device=values.device)
    kept = min(rank, len(values))
    roots[:kept] = values[:kept].sqrt()
    tall, wide = b.new_zeros(len(b), rank, dtype=torch.double), a.new_zeros(rank, a.shape[1], dtype=torch.double)
    tall[:, :kept], wide[:kept] = left @ u[:, :kept], v[:kept] @ right.T
    return (tall * roots).to(b.dtype), (roots[:, None] * wide).to(a.dtype), values


class Orthogonality:
    """λ · Σ over modules ‖A' Qᵀ‖²: how much of the new rows A' lies in the span of the frozen ones, whose basis is Q."""

    def __init__(self, factors: Mapping[str, torch.Tensor], rank: int, weight: float) -> None:
        """`factors` are stacked: of each A the first `rank` rows are the frozen ones."""
        self._terms = [(p, rank, basis(p[:rank])) for name, p in factors.items() if ".lora_A." in name]
        self._weight = weight
        self._highest = torch.zeros(())

    def __call__(self) -> torch.Tensor:
        """Its value, with its gradient."""
        return self._weight * self._overlap()

    def note(self, loss: torch.Tensor, penalty: torch.Tensor) -> None:  # noqa: ARG002 - the protocol's
        """Remember the highest value that stood in a batch's loss; a tensor, since a number would wait for the device."""
        self._highest = torch.maximum(self._highest.to(penalty.device), penalty.detach())

    def outcome(self) -> dict[str, Any]:
        """The last value, and the share of the new rows' length that lies in the frozen ones' span: 0 is orthogonal.

        Raises `Inert` when the penalty was exactly zero throughout.
        """
        overlap = float(self._overlap().detach())
        length = float(sum(p[rank:].detach().square().sum() for p, rank, _ in self._terms))
        if not overlap and not self._highest:
            raise Inert("olora_inert: the penalty was exactly zero throughout: no weight moved")
        return {"penalty": self._weight * overlap, "overlap": (overlap / length) ** 0.5}

    def _overlap(self) -> torch.Tensor:
        parts = [(p[rank:] @ directions.T).square().sum() for p, rank, directions in self._terms]
        return sum(parts[1:], parts[0])
