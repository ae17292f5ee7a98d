import pytest

from replay.records import Arm
from service.errors import NotFound
from service.router import Desired, Resident, Route, models, resolve

BASE = "smollm2"
V = {n: Resident(f"desk@v{n}", f"/versions/desk/v{n}", n) for n in (1, 2, 3)}
KEYS = [f"customer-{n}" for n in range(4000)]


def desired(*held, **route):
    return Desired(1, tuple(V[n] for n in held), {"desk": Route("desk", salt="t1", **route)}, ("desk@v1", "desk@v2", "desk@v3"))


def test_a_line_without_champion_is_answered_by_the_base():
    choice = resolve(desired(), BASE, "desk", "k")
    assert (choice.version, choice.line, choice.arm, choice.trial) == (BASE, "desk", Arm.CHAMPION, None)


def test_the_base_by_its_own_name_has_no_line():
    choice = resolve(desired(1, champion="desk@v1"), BASE, BASE, "k")
    assert (choice.version, choice.line, choice.arm) == (BASE, "", Arm.BASE)


def test_outside_a_trial_the_champion_answers_all():
    table = desired(1, 2, champion="desk@v1", candidate="desk@v2", trial="t1")
    assert {(c.version, c.arm, c.trial) for c in (resolve(table, BASE, "desk", k) for k in KEYS)} == {
        ("desk@v1", Arm.CHAMPION, None)
    }


@pytest.mark.parametrize(
    ("model", "version", "arm"),
    [
        ("desk@v3", "desk@v3", Arm.PINNED),
        ("desk@champion", "desk@v2", Arm.PINNED),
        ("desk@candidate", "desk@v3", Arm.PINNED),
        ("desk@previous", "desk@v1", Arm.PINNED),
        ("desk@base", BASE, Arm.BASE),
    ],
)
def test_pins_and_aliases(model, version, arm):
    table = desired(1, 2, 3, champion="desk@v2", candidate="desk@v3", previous="desk@v1", weight=0.5, trial="t1")
    choice = resolve(table, BASE, model, "k")
    assert (choice.version, choice.line, choice.arm, choice.trial) == (version, "desk", arm, None)


def test_the_champion_of_a_line_without_one_is_the_base():
    assert resolve(desired(), BASE, "desk@champion", "k").version == BASE


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("dusk", "no model 'dusk'"),
        ("dusk@v1", "no model"),
        ("desk@v9", "does not exist"),
        ("desk@v3", "not held in memory"),
        ("desk@candidate", "no candidate now"),
        ("desk@", "does not exist"),
        ("", "no model"),
    ],
)
def test_what_cannot_answer_is_told_what_can(model, why):
    with pytest.raises(NotFound, match=why) as caught:
        resolve(desired(1, champion="desk@v1"), BASE, model, "k")
    assert caught.value.param == "model"
    assert all(name in caught.value.message for name in (BASE, "desk", "desk@champion", "desk@v1"))


def test_a_trial_splits_in_equal_arms_and_only_they_are_evidence():
    table = desired(1, 2, champion="desk@v1", candidate="desk@v2", weight=0.25, trial="t1")
    choices = [resolve(table, BASE, "desk", key) for key in KEYS]
    for arm, version, trial, share in (
        (Arm.CANDIDATE, "desk@v2", "t1", 0.25),
        (Arm.CONTROL, "desk@v1", "t1", 0.25),
        (Arm.CHAMPION, "desk@v1", None, 0.5),
    ):
        group = [c for c in choices if c.arm is arm]
        assert {(c.version, c.trial) for c in group} == {(version, trial)}
        assert abs(len(group) / len(KEYS) - share) < 0.03


def test_a_trial_against_the_base():
    table = desired(2, champion=None, candidate="desk@v2", weight=0.5, trial="t1")
    assert {(c.version, c.arm) for c in (resolve(table, BASE, "desk", k) for k in KEYS)} == {
        ("desk@v2", Arm.CANDIDATE),
        (BASE, Arm.CONTROL),
    }


def test_the_choice_is_sticky_and_hides_the_key():
    table = desired(1, 2, champion="desk@v1", candidate="desk@v2", weight=0.5, trial="t1")
    first = resolve(table, BASE, "desk", "someone@example.com")
    assert first == resolve(table, BASE, "desk", "someone@example.com")
    assert len(first.unit) == 16
    assert "someone" not in first.unit


def test_models_are_the_names_that_can_be_asked():
    table = desired(1, 2, champion="desk@v2", candidate="desk@v3", previous="desk@v1")
    listed = list(models(table, BASE))
    assert [m.id for m in listed] == [BASE, "desk", "desk@champion", "desk@previous", "desk@base", "desk@v1", "desk@v2"]
    assert {m.id: (m.root, m.parent) for m in listed}["desk"] == ("desk@v2", BASE)
    assert listed[0].parent is None
    for model in listed:
        assert resolve(table, BASE, model.id, "k").version == model.root


def test_a_route_needs_its_candidate_only_when_it_gets_traffic():
    assert Route("desk", "desk@v1", "desk@v2").needed == {"desk@v1"}
    assert Route("desk", "desk@v1", "desk@v2", weight=0.1).needed == {"desk@v1", "desk@v2"}
    assert Route("desk").needed == frozenset()
