"""A recorded verdict decides the same again, and another when a count of it was changed."""

import json
from dataclasses import replace

import pytest

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout import verdicts
from service.rollout.controller import Look, Move, judge
from service.rollout.probe import ProbeResult
from service.rollout.stages import Stage, Trial
from service.router import ReplicaReport
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
