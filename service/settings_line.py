"""The settings of a line: when it learns, what a candidate must show on held-out examples and on live traffic.

A part of the tree in `service.settings`, which is where to import from.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.settings_data import Admission, Closed, Drift, Name, Suite
from service.settings_learning import Learning

HALF = 0.5


class Trigger(Closed):
    """When a line learns by itself."""

    min_examples: int = Field(256, ge=1)
    """Admitted examples since the last job."""
    max_age_seconds: float = Field(0, ge=0)
    """Or the oldest untrained example is older than this (and there are at least 16); 0: never."""
    cooldown_seconds: float = Field(600, ge=0)
    """Pause between two jobs of a line."""
    rebase_seconds: float = Field(0, ge=0)
    """Learn all that is remembered again, from the base, by `joint`, so long after that was last done; 0: never."""


class Gate(Closed):
    """What a candidate must show on held-out examples before it meets traffic."""

    score: Literal["exact_match", "likelihood"] = "likelihood"
    """`exact_match`: greedy decoding gives the held-out reply; `likelihood`: mean log-probability of its tokens, in nats."""
    min_gain: float = 0.0
    """The lower bound of the gain on the new examples must exceed this."""
    max_loss: float = Field(0.1, ge=0)
    """An older slice may lose at most this at the lower bound of its difference."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    min_items: int = Field(20, ge=1)
    """Fewer held-out examples make the verdict `inconclusive`."""
    max_kl: float | None = Field(None, gt=0)
    """How far the candidate may be from the champion on neutral texts, in nats per token; None: measured and shown, no limit."""
    max_length_ratio: float = Field(3.0, gt=1)
    """By which factor its replies to what was learned before may be longer or shorter than the champion's."""
    bisect: bool = False
    """When a candidate has lost a slice, train on halves of the new examples to name those that did it, and hold them."""
    bisect_jobs: int = Field(12, ge=1)
    """How many jobs that may take."""


class Guardrail(Closed):
    """Something besides quality that must not get worse in a trial."""

    kind: Literal["error", "latency", "first_token", "long", "short", "refusal", "format", "metric"]
    """A failed reply, one that took longer than `limit` seconds, whose first token did (streams only), with more or fewer than
    `limit` tokens, that opens like a refusal, that has not the form that was asked for; or what a declared metric says."""
    margin: float = Field(gt=0, lt=1)
    """A candidate shown to lose by less may be promoted; one shown to lose by more is rolled back. With the kind `metric`,
    among the units that answer, with `format` among those that ask for a form, and below 0.5 with both."""
    limit: float = Field(0, ge=0)
    phrases: tuple[Annotated[str, Field(pattern=r"\w")], ...] = ()
    """With the kind `refusal`: what a refusal opens with; none: those in `service.refusals`."""
    metric: str = ""
    """With the kind `metric`: a metric of `feedback.metrics`."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.kind == "metric" and not self.metric:
            raise ValueError("a guardrail of the kind `metric` needs `metric`, the name of one in feedback.metrics")
        if self.kind in {"metric", "format"} and self.margin >= HALF:
            raise ValueError(f"a guardrail of the kind `{self.kind}` needs a `margin` below 0.5: some units say nothing of it")
        if self.phrases and self.kind != "refusal":
            raise ValueError(f"`phrases` are for a guardrail of the kind `refusal`, not `{self.kind}`")
        if self.kind in {"latency", "first_token", "long", "short"} and self.limit <= 0:
            raise ValueError(f"a guardrail of the kind `{self.kind}` needs `limit`, in seconds or tokens")
        return self


class Bake(Closed):
    """What follows a promotion: a small share stays on the champion before, to compare with."""

    holdback: float = Field(0.1, ge=0, le=0.5)
    """Share of the units that stay on the previous champion, compared with as many that do not; 0: no bake."""
    min_units: int = Field(500, ge=1)
    """Matured units of each arm before it ends."""
    min_seconds: float = Field(7200, ge=0)
    max_seconds: float = Field(86_400, gt=0)
    """It ends then, with however few units."""
    alpha: float = Field(0.01, gt=0, lt=1)
    """Chance of rolling back a champion that does no harm."""
    alarm: float = Field(10_000.0, gt=1)
    """Evidence of harm that has begun late at which it is rolled back; the mean number of pairs to a false alarm is no less."""


class Shadow(Closed):
    """What comes before the canary: the candidate answers a sample of live prompts too, and nobody reads it."""

    share: float = Field(0, ge=0, le=1)
    """Of the requests that the champion answers; 0: no shadow, what is proven goes to its canary at once."""
    min_pairs: int = Field(50, ge=1)
    """Comparisons without harm that end it."""
    max_seconds: float = Field(3600, gt=0)
    """It ends then with however few, since it is a guard and proves nobody good."""
    margin: float = Field(0.1, gt=0, lt=1)
    """Nats a token by which the candidate may find good replies less likely than the champion does."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Chance of rejecting a candidate that keeps to the margin."""
    max_running: int = Field(1, ge=1)
    """Shadow replies at a time, in each replica."""
    max_busy: int = Field(2, ge=0)
    """None begins while a replica answers more users than this, and those that run are broken off."""
    deadline_seconds: float = Field(30, gt=0)
    """A shadow reply that takes longer has failed; what took the champion half of it is not tried."""


class Anchor(Closed):
    """A share of the units that an older, trusted version answers for ever, so that slow decay shows."""

    holdback: float = Field(0.0, ge=0, le=0.2)
    """That share; up to nine times as many of the champion's are compared with it. 0: none."""
    alarm: float = Field(1000.0, gt=1)
    """Evidence that the champion is worse than the anchor at which the line's trials go forward no more; while it is not, a false
    alarm takes that many units of the anchor on average, or more."""
    revert: float = Field(10_000.0, gt=1)
    """Evidence at which the anchor becomes the champion, where `reverts` is set."""
    reverts: bool = False
    round_units: int = Field(1000, ge=10)
    """Units of the anchor after which all are dealt anew, so that the same users do not stay with it."""

    @model_validator(mode="after")
    def _warns_first(self) -> Self:
        if self.revert < self.alarm:
            raise ValueError(f"revert {self.revert:g} is under alarm {self.alarm:g}: nobody would be warned")
        return self


class Rollout(Closed):
    """How a candidate is proven on live traffic."""

    metric: str = "thumb"
    weights: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Shares of units that the candidate gets, step by step; each step has a control group of equal size."""
    step_min_units: int = Field(20, ge=1)
    """Matured units of each arm before the next step."""
    step_min_seconds: float = Field(0, ge=0)
    """And how long a step lasts at the least."""
    mode: Literal["non_inferiority", "superiority"] = "non_inferiority"
    """What is to be shown of the metric: not worse by the margin, or better. Guardrails keep their margins either way."""
    margin: float = Field(0.05, ge=0, lt=0.5)
    """Non-inferiority margin on the reward in [0, 1], among the units that answer: fewer answers take more units."""
    alpha_promote: float = Field(0.05, gt=0, lt=1)
    """Chance, for each candidate, of promoting one that is worse by the margin."""
    multiplicity: Literal["e_lond", "per_test"] = "e_lond"
    """`e_lond`: besides, at most `fdr` of a line's promotions are false, on average; `per_test`: `alpha_promote` alone."""
    fdr: float = Field(0.1, gt=0, lt=1)
    alpha_rollback: float = Field(0.01, gt=0, lt=1)
    """Half of it for the metric, half shared by the guardrails."""
    guardrails: dict[Name, Guardrail] = {
        "error": Guardrail(kind="error", margin=0.02),
        "slow": Guardrail(kind="latency", limit=30, margin=0.05),
    }
    """Besides the metric, each must be shown not to be worse; who names any, names them all."""
    min_units: int = Field(100, ge=1)
    """Matured units in each arm before a promotion."""
    min_seconds: float = Field(0, ge=0)
    max_units: int = Field(20_000, ge=1)
    max_seconds: float = Field(604_800, gt=0)
    """Out of time: the trial expires and the champion stays."""
    error_burst: int = Field(5, ge=1)
    """Failed replies of the candidate among its last `error_window` that roll it back at once."""
    error_window: int = Field(50, ge=1)
    alpha_mismatch: float = Field(0.001, gt=0, lt=1)
    """Chance of holding a trial whose units are dealt as designed, for an imbalance between its arms."""
    alpha_response: float = Field(0.01, gt=0, lt=1)
    """Chance of holding a trial for a difference in how many say something, where there is none."""
    response_difference: float = Field(0.2, ge=0)
    """Which matters from this on, as a share of the control's rate."""
    max_exposed_twice: float = Field(0.01, ge=0, lt=1)
    """Share of units that both arms answered which holds a trial, from ten on."""
    stale_seconds: float = Field(3600, ge=0)
    """So long may units ask without any feedback before a trial is held until some comes; 0: for ever."""
    min_answered: int = Field(10, ge=0)
    """Units of each arm that have said something before a promotion: silence proves nothing."""
    verify_seconds: float = Field(300, gt=0)
    """How long replicas may take to load and prove a version."""
    is_automatic: bool = True
    """False: a candidate that has passed waits for a person's approval, `learnd rollout promote`."""
    shadow: Shadow = Shadow()
    bake: Bake = Bake()
    anchor: Anchor = Anchor()

    @property
    def phrases(self) -> tuple[str, ...]:
        """What a refusal opens with, as its guardrail says; none: where there is no such guardrail, or it names none."""
        return next((one.phrases for one in self.guardrails.values() if one.kind == "refusal"), ())

    @model_validator(mode="after")
    def _reads_refusals_in_one_way(self) -> Self:
        if sum(one.kind == "refusal" for one in self.guardrails.values()) > 1:
            raise ValueError("guardrails: one of the kind `refusal` is enough, since each reply is read once")
        return self

    @model_validator(mode="after")
    def _has_two_arms_that_only_grow(self) -> Self:
        steps = (0.0, *self.weights)
        if not self.weights or self.weights[-1] > HALF or any(after <= before for before, after in pairwise(steps)):
            raise ValueError(
                f"weights {list(self.weights)}: at least one, rising, each in (0, 0.5]: the control group is as large"
            )
        return self


class Line(Closed):
    """A named lineage of adapters over the base."""

    slices: dict[str, str] = {}
    """Slice by the first pattern (a Python regular expression) found in the prompt, unless the client names one."""
    suites: dict[Name, Suite] = {}
    """Golden examples of your own, by name: NDJSON files with `messages`, `reply` and perhaps `must_pass` in each line."""
    admission: Admission = Admission()
    learning: Learning = Learning()
    trigger: Trigger = Trigger()
    drift: Drift = Drift()
    gate: Gate = Gate()
    rollout: Rollout = Rollout()
