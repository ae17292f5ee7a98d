"""What must not get worse besides quality: the least of the e-processes promotes, any of them takes the candidate out."""

import json
import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout import verdicts
from service.rollout.controller import Look, judge, reward
from service.rollout.guardrails import guards
from service.rollout.probe import ProbeResult
from service.rollout.stages import Stage, Trial
from service.router import ReplicaReport
from service.settings import Bake, Guardrail, Metric, Rollout, Settings

GUARDRAILS = {"error": Guardrail(kind="error", margin=0.1), "slow": Guardrail(kind="latency", limit=2, margin=0.2)}
POLICY = Rollout(
    weights=(0.5,), min_units=30, guardrails=GUARDRAILS, multiplicity="per_test", bake=Bake(holdback=0), alpha_rollback=0.01
)
HELD = (ReplicaReport("r1", 5, {"desk@v2": ProbeResult(ok=True)}),)
PAIRS = 200
NONE = (0.0,) * PAIRS


def trial(**fields):
    plain = {"policy": POLICY, "opened_at": 0.0, "stage": Stage.CANARY, "steps": (0.0,)}
    return Trial("t", "desk", "desk@v2", "desk@v1", **{**plain, **fields})


def units(rewards=(1.0, 0.5), error=(NONE, NONE), slow=(NONE, NONE)):
    """Two hundred pairs: rewards of candidate and control, and each unit's losses."""
    return tuple(
        UnitOutcome(
            f"{arm}{i}", arm, float(i), rewards[side], True, 0, 1, losses={"error": error[side][i], "slow": slow[side][i]}
        )
        for side, arm in enumerate((Arm.CANDIDATE, Arm.CONTROL))
        for i in range(PAIRS)
    )


def judged(outcomes, policy=POLICY):
    return judge(trial(policy=policy), Look(300.0, "desk@v1", HELD, 5, 0.0, tuple(outcomes)))


def failing(share):
    return tuple(float(i % 100 < share * 100) for i in range(PAIRS))


def mixture(factor, pairs=PAIRS):
    """ln of the mean over the six bets of `factor`(bet) ** pairs, written out."""
    return math.log(sum(factor(2.0**-k) ** pairs for k in range(1, 7)) / 6)


def test_the_least_of_them_is_the_evidence_in_closed_form():
    """No errors in either arm: each pair multiplies the wealth by 1 + c (1 / (1 - margin) - 1), and so for each of them."""
    said = judged(units()).evidence
    assert said.promote["error"] == pytest.approx(mixture(lambda c: 1 + c * (1 / 0.9 - 1)), abs=1e-9)
    assert said.promote["slow"] == pytest.approx(mixture(lambda c: 1 + c * (1 / 0.8 - 1)), abs=1e-9)
    assert said.promote["quality"] == pytest.approx(mixture(lambda c: 1 + c * (1.5 / 0.95 - 1)), abs=1e-9)
    assert said.log_promote == min(said.promote.values()) == said.promote["error"]
    assert judged(units()).move.to is Stage.PROMOTING


def half_late():
    """Slow in every sixth: over nothing, and not over the margin of a fifth by much evidence either way."""
    return tuple(float(i % 6 == 0) for i in range(PAIRS))


def test_quality_alone_or_the_mean_of_all_would_promote_what_is_slower():
    """The control of this suite: two wrong ways of putting the processes together pass where the least does not."""
    said = judged(units(slow=(half_late(), NONE)))
    assert said.move is None
    assert said.evidence.log_promote < said.evidence.promote_at
    assert said.evidence.promote["quality"] >= said.evidence.promote_at  # mutant: the metric alone
    assert sum(said.evidence.promote.values()) / 3 >= said.evidence.promote_at  # mutant: their mean
    assert max(said.evidence.promote.values()) >= said.evidence.promote_at  # mutant: any of them


def test_more_errors_than_the_margin_roll_back_whatever_speaks_for_it():
    said = judged(units(error=(failing(0.4), NONE)))
    assert said.move.to is Stage.ROLLING_BACK
    assert said.move.reason.startswith("harmed_error")
    expected = mixture(lambda c: (1 + c * (2 / 1.1 - 1)) ** 0.4 * (1 + c * (1 / 1.1 - 1)) ** 0.6)
    assert said.evidence.harm["error"] == pytest.approx(expected, abs=1e-9)


def test_rollback_wins_a_tie_with_a_promotion():
    both = judged(units(error=(failing(0.4), NONE)), POLICY.model_copy(update={"guardrails": {"error": GUARDRAILS["error"]}}))
    assert both.evidence.promote["quality"] >= both.evidence.promote_at
    assert both.move.to is Stage.ROLLING_BACK


def test_within_its_margin_it_is_no_harm():
    assert judged(units(slow=(failing(0.1), NONE))).evidence.harm["slow"] < 0


def test_an_equal_share_on_both_sides_is_no_harm():
    same = tuple(reversed(failing(0.3)))
    assert judged(units(error=(failing(0.3), same))).move is None or judged(units(error=(same, same))).move.to is Stage.PROMOTING


def test_harm_shares_its_level_half_for_the_metric():
    said = judged(units()).evidence
    assert said.rollback_at == pytest.approx(math.log(200))
    assert said.harm_at == pytest.approx(math.log(400))
    alone = judged(units(), POLICY.model_copy(update={"guardrails": {}})).evidence
    assert alone.rollback_at == pytest.approx(math.log(100))


def test_a_unit_of_which_the_guardrail_is_not_known_proves_nothing():
    bare = [replace(unit, losses={}) for unit in units()]
    said = judged(bare)
    assert said.evidence.promote["error"] == 0.0
    assert said.move is None


def test_it_is_recorded_and_decided_the_same_again():
    said = judged(units(slow=(failing(0.1), NONE)))
    body = json.loads(json.dumps(verdicts.record(trial(), said.move, said)))
    assert body["evidence"]["promote"].keys() == {"quality", "error", "slow"}
    assert [guard["name"] for guard in body["facts"]["tally"]["guards"]] == ["error", "slow"]
    assert verdicts.replay(body).is_same
    body["facts"]["tally"]["guards"][1]["differences"][0][1] += 1
    assert not verdicts.replay(body).is_same


ROW = {
    "error": None,
    "latency_seconds": 1.0,
    "ttft_seconds": None,
    "reply_tokens": 50,
    "is_refusal": None,
    "has_form": None,
}


class Row:
    def __init__(self, **fields):
        self.__dict__.update({**ROW, **fields})


@pytest.mark.parametrize(
    ("guardrail", "missed", "kept"),
    [
        (Guardrail(kind="error", margin=0.1), Row(error="engine_error"), Row(error="client_disconnected")),
        (Guardrail(kind="latency", limit=2, margin=0.1), Row(latency_seconds=2.1), Row(latency_seconds=2.0)),
        (Guardrail(kind="first_token", limit=1, margin=0.1), Row(ttft_seconds=1.1), Row()),
        (Guardrail(kind="long", limit=60, margin=0.1), Row(reply_tokens=61), Row(reply_tokens=60)),
        (Guardrail(kind="short", limit=20, margin=0.1), Row(reply_tokens=19), Row(reply_tokens=20)),
        (Guardrail(kind="refusal", margin=0.1), Row(is_refusal=True), Row(is_refusal=False)),
        (Guardrail(kind="refusal", margin=0.1), Row(is_refusal=True), Row()),
        (Guardrail(kind="format", margin=0.1), Row(has_form=False), Row(has_form=True)),
        (Guardrail(kind="format", margin=0.1), Row(has_form=False), Row()),
    ],
)
def test_what_misses_a_bound(guardrail, missed, kept):
    guard = guards({"it": guardrail}, {}, reward)["it"]
    assert guard.has_missed(missed)
    assert not guard.has_missed(kept)


FORMAT = POLICY.model_copy(update={"guardrails": {"format": Guardrail(kind="format", margin=0.1)}, "stale_seconds": 0})


def askers(broken, pairs=4000, every=20):
    """Pairs of which each twentieth asks for a form, which a share of the candidate's replies do not have."""
    return tuple(
        UnitOutcome(
            f"{arm}{i}",
            arm,
            float(i),
            1.0 if arm is Arm.CANDIDATE else 0.5,
            True,
            0,
            1,
            losses={"format": float(arm is Arm.CANDIDATE and i % every == 0 and (i // every) % 100 < broken * 100)},
            answers={"format": float(i % every == 0)},
        )
        for arm in (Arm.CANDIDATE, Arm.CONTROL)
        for i in range(pairs)
    )


def test_where_few_ask_for_a_form_the_margin_is_theirs():
    half = judged(askers(0.5), FORMAT)
    assert half.move.reason.startswith("harmed_format")
    everybody = [replace(unit, answers={}) for unit in askers(0.5)]
    assert judged(everybody, FORMAT).move.to is Stage.PROMOTING  # the control: by a margin of all units, each second form breaks
    kept = judged(askers(0.0), FORMAT)
    assert kept.move.to is Stage.PROMOTING
    assert kept.evidence.promote["format"] == pytest.approx(mixture(lambda c: 1 + c * (1 / 0.9 - 1), 200), abs=1e-9)


def test_where_nobody_asks_for_a_form_nothing_is_proven():
    silent = [replace(unit, answers={"format": 0.0}) for unit in askers(0.0)]
    said = judged(silent, FORMAT)
    assert said.move is None
    assert said.evidence.promote["format"] == pytest.approx(0.0, abs=1e-9)


def test_what_a_guard_on_forms_is_about():
    guard = guards({"it": FORMAT.guardrails["format"]}, {}, reward)["it"]
    assert [guard.is_about(Row(has_form=found)) for found in (True, False, None)] == [True, True, False]
    assert guards({"it": Guardrail(kind="refusal", margin=0.1)}, {}, reward)["it"].is_about is None


def test_a_look_at_forms_is_recorded_and_decided_the_same_again():
    said = judged(askers(0.5), FORMAT)
    body = json.loads(json.dumps(verdicts.record(trial(policy=FORMAT), said.move, said)))
    assert verdicts.replay(body).is_same
    body["facts"]["tally"]["guards"][0]["answered"][0][1] += 1
    assert not verdicts.replay(body).is_same


def test_a_declared_metric_is_a_guardrail_too():
    guard = guards({"it": Guardrail(kind="metric", metric="refused", margin=0.1)}, {"refused": REFUSED}, reward)["it"]
    assert (guard.metric, guard.reward(True), guard.reward(False)) == ("refused", 0.0, 1.0)


REFUSED = Metric(type="boolean", optimize="min")


def test_settings_say_what_a_guardrail_lacks():
    with pytest.raises(ValidationError, match="needs `limit`"):
        Guardrail(kind="latency", margin=0.1)
    with pytest.raises(ValidationError, match="needs `metric`"):
        Guardrail(kind="metric", margin=0.1)
    with pytest.raises(ValidationError, match=r"below 0\.5"):
        Guardrail(kind="format", margin=0.5)
    with pytest.raises(ValidationError, match="`phrases` are for"):
        Guardrail(kind="format", margin=0.1, phrases=("no",))
    with pytest.raises(ValidationError, match="phrases"):
        Guardrail(kind="refusal", margin=0.1, phrases=(" ",))
    two = {name: Guardrail(kind="refusal", margin=0.1) for name in ("a", "b")}
    with pytest.raises(ValidationError, match="`refusal` is enough"):
        Rollout(guardrails=two)
    wrong = {"guardrails": {"refusal": {"kind": "metric", "metric": "refusal", "margin": 0.1}}}
    with pytest.raises(ValidationError, match=r"guardrails.refusal.metric 'refusal' is not declared"):
        Settings(lines={"desk": {"rollout": wrong}})
