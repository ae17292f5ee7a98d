"""A recorded verdict decides the same again, and another when a count of it was changed."""

import json
from dataclasses import replace

import pytest

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout import anchor, gates, verdicts
from service.rollout.controller import Look, Move, judge
from service.rollout.probe import ProbeResult
from service.rollout.stages import Stage, Trial
from service.router import ReplicaReport
from tests.service.rollout import test_anchor, test_gates
from tests.service.rollout.policy import POLICY

HELD = (ReplicaReport("r1", 5, {"desk@v2": ProbeResult(ok=True)}),)
REFUSED = (ReplicaReport("r1", 5, {"desk@v2": ProbeResult(ok=False, reason="noop_adapter")}),)


def units(candidate, control):
    both = ((Arm.CANDIDATE, candidate), (Arm.CONTROL, control))
    return tuple(UnitOutcome(f"{arm}{i}", arm, i, r, True, 0, 1) for arm, rewards in both for i, r in enumerate(rewards))


BETTER, WORSE, SAME = units([0.7] * 40, [0.1] * 40), units([0.0] * 40, [1.0] * 40), units([0.5] * 40, [0.5] * 40)
LOPSIDED = units([1.0] * 120, [0.0] * 40)
CASES = {
    "hold": (Stage.CANARY, {"outcomes": LOPSIDED}),
    "promoting": (Stage.CANARY, {"outcomes": BETTER}),
    "rolling_back": (Stage.CANARY, {"outcomes": WORSE}),
    "canary": (Stage.CANARY, {"outcomes": SAME}),
    "expired": (Stage.CANARY, {"outcomes": SAME[:25], "now": 1001.0}),
    "aborted": (Stage.CANARY, {"outcomes": BETTER, "champion": "desk@v7"}),
    "rejected": (Stage.VERIFYING, {"replicas": REFUSED}),
    "live": (Stage.PROMOTING, {"outcomes": BETTER}),
    "rolled_back": (Stage.ROLLING_BACK, {}),
}


def recorded(case, **changes):
    """What is read back from the disk, and what was decided."""
    stage, fields = CASES[case]
    steps = () if stage is Stage.VERIFYING else (0.0,)
    trial = Trial("desk-trial1", "desk", "desk@v2", "desk@v1", POLICY, 0.0, stage=stage, steps=steps, reason="why", **changes)
    plain = {"now": 100.0, "champion": "desk@v1", "replicas": HELD, "desired": 5, "serving_since": 0.0}
    said = judge(trial, Look(**{**plain, **fields}))
    return json.loads(json.dumps(verdicts.record(trial, said.move, said))), said


@pytest.mark.parametrize("case", CASES)
def test_every_verdict_is_decided_the_same_again(case):
    body, said = recorded(case)
    assert said.move.to == case
    again = verdicts.replay(body)
    assert again.is_same
    assert again.is_same_code
    assert again.recorded == again.replayed == f"{said.move.to}: {said.move.reason}"


def test_a_record_says_what_it_rests_on():
    body, said = recorded("promoting")
    assert body["by"] == "auto"
    assert body["facts"]["tally"] == {
        "assigned": [[0, 0], [40, 40]],
        "matured": [[0, 0], [40, 40]],
        "differences": [[0.6, 40]],
        "differences_answered": [[0.6, 40]],
        "answered": [40, 40],
        "guards": [],
        "responses": [[0.0, 40]],
        "path": [],
    }
    assert body["evidence"] == said.evidence.to_json()
    assert body["evidence"].keys() >= {"log_promote", "log_rollback", "promote_at", "rollback_at", "difference", "pairs"}
    assert len(body["policy_digest"]) == len(body["code_digest"]) == 64


TAMPERED = {
    "a pair more": lambda body: body["facts"]["tally"]["differences"][0].__setitem__(1, 41),
    "another difference": lambda body: body["facts"]["tally"]["differences"][0].__setitem__(0, 0.61),
    "units": lambda body: body["facts"]["tally"]["matured"][1].__setitem__(0, 41),
    "a log": lambda body: body["evidence"].__setitem__("log_promote", body["evidence"]["log_promote"] + 1e-6),
    "the move": lambda body: body["move"].__setitem__("to", "waiting"),
    "the policy": lambda body: body["trial"]["policy"].__setitem__("margin", 0.06),
    "the policy, where it changes nothing": lambda body: body["trial"]["policy"].__setitem__("max_units", 499),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_record_that_was_tampered_with_differs(what):
    body, _ = recorded("promoting")
    TAMPERED[what](body)
    assert not verdicts.replay(body).is_same


def test_what_a_person_asked_for_has_nothing_to_recompute():
    _, said = recorded("canary")
    trial = Trial("desk-trial1", "desk", "desk@v2", "desk@v1", POLICY, 0.0, stage=Stage.CANARY, steps=(0.0,))
    body = verdicts.record(trial, Move(Stage.PROMOTING, "operator: promote"), None)
    again = verdicts.replay(json.loads(json.dumps(body)))
    assert (body["by"], again.replayed, again.is_same) == ("operator", None, True)
    assert verdicts.record(replace(trial, since=1.0), said.move, said)["policy_digest"] == body["policy_digest"]


def test_other_code_is_said():
    body, _ = recorded("promoting")
    assert not verdicts.replay({**body, "code_digest": "0" * 64}).is_same_code


MEASURED = {
    "pass": {"slices": {"new": test_gates.part(0.1, 0.8), "old": test_gates.part(0.8, 0.8, is_new=False)}},
    "fail": {"slices": {"new": test_gates.part(0.1, 0.8), "old": test_gates.part(0.9, 0.4, is_new=False)}},
    "inconclusive": {"slices": {"new": test_gates.part(0.0, 1.0, items=19)}},
}
BESIDE = {
    "suites": {"vip": {**test_gates.part(0.5, 0.5, is_new=False), "must_pass": [True, False] * 25}},
    "lengths": {"champion": [3] * 9, "candidate": [4] * 9},
    "looks": {"old": 3},
}


def gate_record(outcome, version=None, **beside):
    said = gates.judge({**MEASURED[outcome], **beside}, test_gates.GATE)
    return json.loads(json.dumps(verdicts.record_gate("desk-job3", version, test_gates.GATE, said))), said


@pytest.mark.parametrize("outcome", MEASURED)
@pytest.mark.parametrize("beside", [{}, {**BESIDE, "kl": 0.2}, {**BESIDE, "kl": float("nan")}], ids=["plain", "all", "no number"])
def test_what_the_gate_said_is_decided_the_same_again(outcome, beside):
    body, said = gate_record(outcome, **beside)
    again = verdicts.replay(body)
    assert (again.is_same, again.is_same_code) == (True, True)
    assert again.recorded == again.replayed == f"gate_{said.outcome}: {'; '.join(said.reasons)}"
    assert said.outcome == ("fail" if beside else outcome)  # an item that must pass was missed


FORGED = {
    "a difference": lambda body: body["facts"]["slices"][0]["differences"].__setitem__(0, 1.0),
    "a mean": lambda body: body["facts"]["slices"][0].__setitem__("champion", 0.2),
    "a missed item": lambda body: body["facts"]["missed"].pop(),
    "the outcome": lambda body: body["verdict"].__setitem__("outcome", "pass"),
    "a bound": lambda body: body["verdict"]["findings"][0].__setitem__("low", 0.9),
    "the settings": lambda body: body["policy"].__setitem__("max_loss", 0.6),
    "the settings, where it changes nothing": lambda body: body["policy"].__setitem__("bisect_jobs", 3),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_the_gate_said_and_was_tampered_with_differs(what):
    body, _ = gate_record("fail", **BESIDE)
    FORGED[what](body)
    assert not verdicts.replay(body).is_same


def test_settings_that_this_code_does_not_know_are_said():
    body, _ = gate_record("pass")
    body["policy"]["min_joy"] = 1
    assert verdicts.replay(body).replayed == "cannot be read by this learnd: 1 fields"


def test_what_the_gate_rests_on_is_small():
    likely = {who: {"loglik": [-1 / (i + place) for i in range(1, 201)], "exact": [0.0] * 200} for place, who in enumerate(WHO)}
    slices = {f"slice{n}": {"is_new": not n, "ids": [f"an-id-{i}" for i in range(200)], **likely} for n in range(10)}
    gate = test_gates.Gate()
    said = gates.judge({"slices": slices}, gate)
    kept = len(json.dumps(verdicts.record_gate("desk-job3", None, gate, said)))
    assert kept < 30_000 < len(json.dumps(slices)) / 5


WHO = ("candidate", "champion", "base")


@pytest.mark.parametrize(("reverts", "does"), [(True, "revert"), (False, "alarm")])
def test_a_verdict_against_an_anchor_is_decided_the_same_again(reverts, does):
    policy = test_anchor.POLICY.model_copy(update={"reverts": reverts})
    seen = test_anchor.sight(test_anchor.WORSE)
    step = anchor.judge(test_anchor.OPEN, seen, policy)
    body = json.loads(json.dumps(verdicts.record_anchor(test_anchor.OPEN, seen, policy, step)))
    again = verdicts.replay(body)
    assert (again.is_same, again.is_same_code, again.recorded) == (True, True, f"{does}: {step.reason}")
    assert (len(body["facts"]["sample"]["differences"]), body["facts"]["sample"]["units"]) == (50, [50, 50])
    for forge in (
        lambda one: one["facts"]["sample"]["differences"].__setitem__(3, 0.0),
        lambda one: one["watch"]["walk"].__setitem__(0, 0.1),
        lambda one: one["step"].__setitem__("does", "note"),
        lambda one: one["policy"].__setitem__("alarm", 999.0),
    ):
        forged = json.loads(json.dumps(body))
        forge(forged)
        assert not verdicts.replay(forged).is_same


def test_a_record_is_found_by_what_it_is_about():
    trial, _ = recorded("promoting")
    assert verdicts.names(trial) == {"desk-trial1", "desk@v2"}
    assert verdicts.names(gate_record("pass", "desk@v2")[0]) == {"desk-job3", "desk@v2"}
    assert verdicts.names(gate_record("fail")[0]) == {"desk-job3"}
