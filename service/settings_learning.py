"""The settings of how a line's next adapter is trained. A part of the tree in `service.settings`: import from there."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from replay.records import Wanted
from service.settings_data import Closed, Name, Suite


class Preferences(Closed):
    """What a job learns from besides demonstrations, after them: thumbs by KTO, pairs of replies by DPO. All off by default."""

    thumbs: tuple[Name, ...] = ()
    """Boolean metrics whose values are learned from."""
    corrections: bool = False
    """A corrected reply is a pair: the correction is better than what was served."""
    picks: bool = False
    """A `preference` between two replies is a pair."""
    min_items: int = Field(64, ge=2)
    """Opinions of a kind that must train, or they wait."""
    min_minority: int = Field(8, ge=1)
    """So must as many thumbs up, and down."""
    max_items: int = Field(1000, ge=2)
    """Opinions of a kind that one job takes, the newest."""
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the champion: its KL divergence costs so much."""
    learning_rate: float = Field(1e-5, gt=0)
    epochs: float = Field(1, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    """Share of the pairs that are the wrong way round."""
    imitation: float = Field(0.2, ge=0)
    """Weight of imitating the better reply beside DPO, so that it does not become less likely too."""

    def wanted(self, good: Mapping[str, bool]) -> Wanted:
        """As `replay` has it, given which value of each metric means good."""
        limits = self.model_dump(include={"corrections", "picks", "min_items", "min_minority", "max_items"})
        return Wanted(thumbs={name: good[name] for name in self.thumbs}, **limits)


class Learning(Closed):
    """How a line's next adapter is trained."""

    strategy: Literal["naive", "replay", "der++", "ewc", "ewc+replay", "ewc+der++", "o-lora", "joint"] = "replay"
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    rslora: bool = False
    """Scale by alpha/√rank in place of alpha/rank."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How a fresh adapter begins; `learners/initial.py`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    learning_rate: float = Field(2e-4, gt=0)
    epochs: float = Field(2, gt=0)
    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(2, ge=1)
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation; `auto`: the faster one here. The adapter's weights are fp32 either way."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again in the backward pass to save memory; `auto`: on a GPU."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(1024, ge=32)
    early_stopping_patience: int = Field(3, ge=0)
    """Evaluations without improvement before training stops; 0: never."""
    replay_capacity: int = Field(5000, ge=0)
    """Examples remembered by each line, over all slices."""
    replay_ratio: float = Field(1.0, ge=0)
    """Remembered examples for each fresh one, under `replay`; others in each epoch, while there are others."""
    der_alpha: float = Field(0.5, ge=0)
    """Weight of the divergence from what earlier versions thought of remembered examples, under `der++`."""
    der_beta: float = Field(0.5, ge=0)
    """Weight of the cross entropy of those examples, under `der++`."""
    general_ratio: float = Field(0.0, ge=0)
    """General instructions for each fresh example, wherever there is rehearsal."""
    general: Suite | None = None
    """A file of your own for them, in the form of a golden suite; None: the shipped one."""
    progressive_mixing: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Shares of the fresh examples in as many equal parts of a job; empty: the mixture's own share throughout."""
    ewc_kappa: float = Field(1.0, ge=0)
    """Weight of the penalty under `ewc`; 1: old examples count as much as new ones, 0: none."""
    ewc_gamma: float = Field(0.95, ge=0, le=1)
    """What is left of the older examples' Fisher at each promotion."""
    ewc_form: Literal["factors", "product"] = "factors"
    """Whose Fisher: that of A and B each, or that of what they make together, which does not depend on how it is factored."""
    ewc_sequences: int = Field(512, ge=1)
    """Fresh examples that a version's Fisher is taken on, at most."""
    olora_lambda: float = Field(0.5, ge=0)
    """Weight of the overlap with the champion's directions, under `o-lora`."""
    preferences: Preferences = Preferences()
    seed: int = 0
    """Of everything random in a job; what a line remembers is the same for every seed."""

    @model_validator(mode="after")
    def _mixes_more_and_more(self) -> Self:
        if any(after < before for before, after in pairwise(self.progressive_mixing)):
            raise ValueError(f"progressive_mixing {list(self.progressive_mixing)}: the share of what is new rises")
        return self

    @model_validator(mode="after")
    def _keeps_to_its_anchor(self) -> Self:
        if "ewc" in self.strategy and self.weight_decay:
            raise ValueError(f"weight_decay {self.weight_decay} pulls weights to zero, `ewc` to the champion's: set it to 0")
        if self.strategy == "o-lora" and self.weight_decay:
            raise ValueError(
                f"weight_decay {self.weight_decay} would shrink the champion's weights, which `o-lora` freezes: set it to 0"
            )
        if self.init in {"pissa", "olora"} and self.weight_decay:
            raise ValueError(f"weight_decay {self.weight_decay} would pull at the frozen half of init {self.init!r}: set it to 0")
        if self.init not in {"default", "gaussian"} and self.rank % 2:
            raise ValueError(f"init {self.init!r} needs an even rank, not {self.rank}")
        return self
