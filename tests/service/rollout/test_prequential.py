"""The prequential score of a line, from what its jobs measured."""

import pytest

from service.rollout import gates, stream


def part(ids, champion, *, is_new=True):
    """A slice of an evaluation: what base and champion gave, and a candidate that has learned it all."""
    scores = {"base": [0.0] * len(ids), "champion": champion, "candidate": [1.0] * len(ids)}
    return {"is_new": is_new, "ids": ids, **{who: {"exact": s, "loglik": s} for who, s in scores.items()}}


def grown(slices, parent, came, version="desk@v1"):
    evaluation = {"slices": slices}
    return stream.beside(gates.matrix(evaluation, parent, version), evaluation, parent, came)


def test_new_examples_count_as_the_champion_gave_them_in_the_order_in_which_they_came():
    slices = {"a": part(["a1", "a2"], [1.0, 0.0]), "b": part(["b1", "b2"], [1.0, 0.0])}
    found = grown(slices, {}, ["b2", "x", "a2", "b1", "a1"])["exact"]["prequential"]
    assert (found["items"], found["mean"]) == (4, 0.5)
    weights = [0.995**n for n in (3, 2, 1, 0)]  # b2, a2, b1, a1
    assert found["faded"] == pytest.approx((weights[2] + weights[3]) / sum(weights))


def test_what_was_learned_before_does_not_count_again_and_the_next_version_goes_on():
    first = grown({"a": part(["a1", "a2"], [0.0, 0.0])}, {}, ["a1", "a2"])
    slices = {"a": part(["a3"], [1.0]), "a (older)": part(["a1", "a2"], [1.0, 1.0], is_new=False)}
    found = grown(slices, first, ["a3"], "desk@v2")["loglik"]
    assert (found["prequential"]["items"], found["prequential"]["mean"]) == (3, pytest.approx(1 / 3))
    assert found["versions"] == ("desk@v1", "desk@v2"), "the matrix is as it was"


def test_before_a_champion_the_base_answers_and_a_line_of_older_versions_begins_now():
    slices = {"a": {**part(["a1"], [1.0]), "champion": None}}
    assert grown(slices, {"exact": {}, "loglik": {}}, ["a1"])["exact"]["prequential"]["mean"] == 0.0
    old = gates.matrix({"slices": {"a": part(["a0"], [0.0])}}, {}, "desk@v1")
    assert grown({"a": part(["a1"], [1.0])}, old, ["a1"], "desk@v2")["exact"]["prequential"]["items"] == 1
