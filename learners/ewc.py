"""Online elastic weight consolidation (Kirkpatrick et al. 2017; Schwarz et al. 2018): weights that mattered move less.

    L(θ) = mean loss over N tokens  +  κ/(2N) · Σᵢ F̄ᵢ (θᵢ − θ*ᵢ)²         F̄ ← γ F̄ + n F̂(θ*)

θ are the LoRA factors A and B, θ* those of the champion that the job starts from; F̂ is the Fisher per token at a finished
version (`learners/fisher.py`), n the tokens of the fresh replies that it learned, N those of the replies in an epoch of the job.
F̄ sums over tokens, so κ/N makes it λ = κ · N_old/N_new on the mean Fisher, the scale on which κ = 1 is Laplace's approximation:
on quadratic losses it gives joint training's optimum. There is one bowl, around the latest version, not one for each task, which
would count old examples twice (Huszár 2018). Remembered examples are not counted again in F̄; γ < 1 forgets slowly.

Anchor and Fisher belong to a version: its job computes them, its folder keeps them, and the next job reads the champion's. So
they move at a promotion only, a candidate that fails leaves nothing, and a roll-back restores them. A warm start keeps the
factors' space; a line's first version starts at B = 0, where A has no Fisher yet, and has nothing to keep: no penalty. The same
holds after a champion of a line that had another strategy; a job that learns by another for once leaves a Fisher all the same.
What the diagonal cannot see is that (A, B) and (MA, BM⁻¹) are one function; `ewc_form = "product"` can (`learners/product.py`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from learners.distill import PREFIX as DARK
from learners.naive import Naive
from replay.records import Example

if TYPE_CHECKING:  # the service plans with these strategies, without torch
    from torch import Tensor

    from learners.encode import Encoded

PRODUCT = "product."
"""Of the names under which the Fisher of the factors' product is kept (`learners/product.py`)."""

STIFF_RATIO, STIFF_SHARE = 10.0, 0.2
"""A penalty so many times the loss, in more than that share of the batches, leaves no room to learn."""
FAINT_RATIO = 0.01
"""A penalty that was never more than this share of the mean loss has changed next to nothing."""

_LEAST_LOSS = 1e-12
"""In nats: what a loss of exactly zero counts as in a quotient."""


class Inert(ValueError):
    """The penalty has no effect although it should have one; the message says why."""


class Penalty:
    """κ/(2N) · Σ F̄ (θ − θ*)² in nats per token, anchored where the factors are when it is made."""

    def __init__(self, factors: Mapping[str, Tensor], fisher: Mapping[str, Tensor], scale: float) -> None:
        """`scale` is κ/N. Raises `Inert` when the Fisher is not that of these factors, or says nothing about them."""
        _check(factors, fisher)
        self._terms = [(p, p.detach().clone(), (scale * fisher[name]).to(p.device)) for name, p in factors.items()]
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self) -> Tensor:
        """Its value, with its gradient."""
        parts: list[Tensor] = [(curvature * (p - anchor).square()).sum() for p, anchor, curvature in self._terms]
        return sum(parts[1:], parts[0]) / 2

    def note(self, loss: Tensor, penalty: Tensor) -> None:
        """Remember what stood in a batch's loss, for `outcome`; tensors, since a number would wait for the device."""
        self._seen.append((loss.detach(), penalty.detach()))

    def outcome(self) -> dict[str, Any]:
        """What it came to, with a warning; raises `Inert` when it was exactly zero from the first batch to the end."""
        last = float(self().detach())
        seen = [(float(loss), float(penalty)) for loss, penalty in self._seen]
        highest = max([last, *(penalty for _, penalty in seen)])
        if not highest:
            raise Inert("ewc_inert: the penalty was exactly zero throughout: no weight moved, or none that its Fisher knows")
        stiff = sum(penalty > STIFF_RATIO * loss for loss, penalty in seen) / max(len(seen), 1)
        told: dict[str, Any] = {"penalty": last, "penalty_stiff_share": stiff, "penalty_to_loss": _course(seen)}
        if stiff > STIFF_SHARE:
            told["warning"] = f"ewc_stiff: the penalty was over {STIFF_RATIO:g} times the loss in {stiff:.0%} of the batches"
        elif seen and highest < FAINT_RATIO * sum(loss for loss, _ in seen) / len(seen):
            told["warning"] = (
                f"ewc_faint: the penalty was never over {FAINT_RATIO:.0%} of the loss, so it changed next to nothing"
            )
        return told


class Ewc:
    """Another strategy's examples, with the penalty beside their loss."""

    is_from_base = False
    is_stacked = False

    def __init__(self, examples: Naive) -> None:
        self._examples = examples
        self.name = "ewc" if examples.name == "naive" else f"ewc+{examples.name}"

    def plan(
        self, fresh: Sequence[Example], remembered: Sequence[Example], general: Sequence[Example], ratio: float, seed: int
    ) -> list[Example]:
        """The other strategy's."""
        return self._examples.plan(fresh, remembered, general, ratio, seed)

    def penalty(
        self, factors: Mapping[str, Tensor], state: Mapping[str, Tensor], tokens: int, settings: Mapping[str, Any]
    ) -> Penalty | None:
        """None while there is no Fisher, when κ is 0, or when there is nothing to learn."""
        known = _own(state, settings)
        if not known or not settings["ewc_kappa"] or not tokens:
            return None
        scale = settings["ewc_kappa"] / tokens
        if _is_of_the_product(settings):
            from learners.product import ProductPenalty

            return ProductPenalty(factors, known, scale, _adapter_scale(settings))
        return Penalty(factors, known, scale)

    def distillation(self, remembered: Sequence[Encoded], state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
        """The other strategy's."""
        return self._examples.distillation(remembered, state, settings)

    def consolidate(
        self,
        model: Any,
        factors: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        fresh: Sequence[Encoded],
        pad_id: int,
        settings: Mapping[str, Any],
        kept: Collection[int] | None = None,
    ) -> dict[str, Tensor]:
        """F̄ by the names of the factors, beside what the other leaves; F̂ is taken on `ewc_sequences` fresh examples at most."""
        sample = random.Random(settings["seed"]).sample(fresh, min(len(fresh), settings["ewc_sequences"]))  # noqa: S311 - no secret
        tokens = sum(e.reply_length for e in fresh)
        known, faded = _own(state, settings), settings["ewc_gamma"]
        if _is_of_the_product(settings):
            from learners.product import joined, moments

            left = joined(known, moments(model, factors, sample, pad_id, settings["seed"]), tokens, faded)
        else:
            from learners.fisher import fisher

            found = fisher(model, factors, sample, pad_id, settings["seed"])
            left = {name: tokens * new.cpu() + (faded * known[name] if known else 0) for name, new in found.items()}
        beside: dict[str, Tensor] = self._examples.consolidate(model, factors, state, fresh, pad_id, settings, kept)
        return {**(left if any(curvature.any() for curvature in left.values()) else {}), **beside}


def _course(seen: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How many times the loss the penalty was in the first, the middle and the last batch; nothing before any was seen."""
    places = {"start": 0, "middle": len(seen) // 2, "end": len(seen) - 1} if seen else {}
    return {name: seen[place][1] / max(seen[place][0], _LEAST_LOSS) for name, place in places.items()}


def _adapter_scale(settings: Mapping[str, Any]) -> float:
    """What y = W x + s B A x has as s: alpha/rank, with rsLoRA alpha/√rank."""
    rank = settings["rank"]
    return float(settings["alpha"] / (math.sqrt(rank) if settings.get("rslora") else rank))


def _is_of_the_product(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("ewc_form") == "product")


def _own(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What an `ewc` version left in the form that is asked for."""
    ours = {name: tensor for name, tensor in state.items() if not name.startswith(DARK)}
    return {name: tensor for name, tensor in ours.items() if name.startswith(PRODUCT) == _is_of_the_product(settings)}


def _check(factors: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> None:
    strays = sorted({name for name in factors.keys() | fisher.keys() if _shape(factors, name) != _shape(fisher, name)})
    if strays:
        raise Inert(f"ewc_inert: the champion's Fisher is not of these factors: {strays[0]} and {len(strays) - 1} more differ")
    check_entries(fisher)


def check_entries(fisher: Mapping[str, Tensor]) -> None:
    """Raise `Inert` unless all entries are finite and none negative, and some entry is not zero."""
    if not all(f.isfinite().all() and (f >= 0).all() for f in fisher.values()) or not any(f.any() for f in fisher.values()):
        raise Inert("ewc_inert: the champion's Fisher is zero everywhere, or has entries that are negative or not finite")


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
