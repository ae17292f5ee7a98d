"""O-LoRA (Wang et al. 2023): each lesson gets an adapter of its own, in directions that the earlier ones do not read.

    L(θ) = mean loss  +  λ · Σ over modules ‖A' Qᵀ‖²_F               y = W x + s [B  B'] [A; A'] x

A and B are the champion's factors, frozen; A' and B' those of a fresh adapter of the same rank, which alone learn; the rows of Q
are an orthonormal basis of A's. The norm is the paper's, a sum of squares; its published code sums absolute values. Squares
depend on the two spans alone, absolute values also on the basis that each happens to be written in, and pull as hard at a hair's
breadth as far away. A' starts outside the champion's span, so that the penalty need not first fight what chance has drawn.

The paper keeps every lesson's adapter, so its rank grows by each. Here the sum is compressed to the line's own rank when the
lesson is learned (`learners/subspace.py`), and what that lost is told: `compression_error` in the version's metrics, the relative
Frobenius error over all modules. What is measured, tried and served is the compressed adapter. The next lesson keeps out of the
span of what is served, not of what compression has already dropped. So nothing but the adapter itself is left for the next job.
A line's first version has nothing to keep out of: it learns as under `naive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from learners.naive import Naive

if TYPE_CHECKING:  # the service plans with these strategies, without torch
    from torch import Tensor

    from learners.subspace import Orthogonality


class Orthogonal(Naive):
    """Learn the fresh examples beside the frozen champion."""

    name = "o-lora"
    is_stacked = True

    def penalty(  # type: ignore[override] # naive ignores what it is given
        self,
        factors: Mapping[str, Tensor],
        state: Mapping[str, Tensor],  # noqa: ARG002 - the protocol's
        tokens: int,  # noqa: ARG002 - the protocol's
        settings: Mapping[str, Any],
    ) -> Orthogonality | None:
        """None where there is no champion beneath, or λ is 0."""
        from learners.subspace import Orthogonality

        rank = settings["rank"]
        is_alone = all(len(p) <= rank for name, p in factors.items() if ".lora_A." in name)
        return None if is_alone or not settings["olora_lambda"] else Orthogonality(factors, rank, settings["olora_lambda"])
