"""Dark experience replay (Buzzega et al. 2020, "DER++") for language models: what is rehearsed is also thought as it was.

    L(θ) = 1/N · [ Σ fresh CE  +  Σ remembered ( β CE + α KL(q ‖ p_θ) ) ]              sums over reply tokens, N of them

q is what the version that learned an example thought of each token of its reply (`learners/dark.py`): it holds more than the
label, how sure to be and what else would do. The papers store all logits and compare them by squares; a vocabulary of 49k would
be 200 kB a token, and logits are known up to a constant only. So: the 64 likeliest tokens, the rest's mass, and a divergence.
Remembered examples of which nothing is known are rehearsed as under `replay`; with α = 0 and β = 1 all of them are.

What is known of an example is stored when it is learned, by the job that makes the version, in the version's folder; the next
job takes it over for what the line's buffer will still hold. So it is the promoted versions' alone, a candidate that fails leaves
nothing, a roll-back restores, and what was erased is in no version that comes after.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from learners.rehearsal import Rehearsal

if TYPE_CHECKING:  # the service plans with these strategies, without torch
    from torch import Tensor

    from learners.dark import Distillation
    from learners.encode import Encoded

PREFIX = "dark."
"""Of the names under which it is kept, so that it can lie beside another strategy's."""


class DarkRehearsal(Rehearsal):
    """Rehearse, and stay near what was thought of what is rehearsed."""

    name = "der++"

    def distillation(
        self, remembered: Sequence[Encoded], state: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> Distillation | None:
        """None where it would change nothing: nothing is known, or the weights say so."""
        from learners.dark import Distillation

        known, alpha, beta = _own(state), settings["der_alpha"], settings["der_beta"]
        return Distillation(known, remembered, alpha, beta) if known and remembered and (alpha, beta) != (0, 1) else None

    def consolidate(
        self,
        model: Any,
        factors: Mapping[str, Tensor],  # noqa: ARG002 - the protocol's
        state: Mapping[str, Tensor],
        fresh: Sequence[Encoded],
        pad_id: int,
        settings: Mapping[str, Any],  # noqa: ARG002 - the protocol's
        kept: Collection[int] | None = None,
    ) -> dict[str, Tensor]:
        """What this version thinks of what it learned afresh, and what earlier ones thought, of what is kept."""
        from learners.dark import joined, look

        chosen = [e for e in fresh if kept is None or e.key in kept]
        return joined(_own(state), look(model, chosen, pad_id), kept)


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
