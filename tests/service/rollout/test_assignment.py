import hashlib

import pytest

from replay.records import Arm
from service.rollout.assignment import arm_at, place_of, unit_of

KEYS = [f"customer-{n}" for n in range(5000)]


def arms(salt, weight):
    return [arm_at(place_of(salt, key), weight) for key in KEYS]


def test_places_are_a_fixed_function():
    assert place_of("t1", "k") == int(hashlib.sha256(b"t1|k").hexdigest()[:16], 16) / 2**64
    assert unit_of("k") == hashlib.sha256(b"k").hexdigest()[:16]
    assert unit_of("nobody-r") == "nobody-" + hashlib.sha256(b"nobody-r").hexdigest()[:16]


@pytest.mark.parametrize("weight", [0.1, 0.25, 0.5])
def test_candidate_and_control_are_of_the_weights_size(weight):
    seen = arms("t1", weight)
    for arm in (Arm.CANDIDATE, Arm.CONTROL):
        deviation = (weight * (1 - weight) / len(KEYS)) ** 0.5
        assert abs(seen.count(arm) / len(KEYS) - weight) < 4 * deviation


def test_raising_the_weight_moves_nobody_between_the_groups():
    for small, large in ((0.1, 0.25), (0.25, 0.5)):
        for before, after in zip(arms("t1", small), arms("t1", large), strict=True):
            assert before in {after, Arm.CHAMPION}


def test_the_wrong_split_would_move_them():
    """The well-known wrong variant, control next to the candidate, fails the same demand."""

    def wrong(place, weight):
        if place < weight:
            return Arm.CANDIDATE
        return Arm.CONTROL if place < 2 * weight else Arm.CHAMPION

    places = [place_of("t1", key) for key in KEYS]
    assert any(wrong(p, 0.1) is Arm.CONTROL and wrong(p, 0.25) is Arm.CANDIDATE for p in places)


def test_another_trial_deals_anew():
    first, second = (
        {key for key, arm in zip(KEYS, arms(salt, 0.5), strict=True) if arm is Arm.CANDIDATE} for salt in ("t1", "t2")
    )
    assert abs(len(first & second) / len(KEYS) - 0.25) < 0.03


@pytest.mark.parametrize(
    ("place", "weight", "arm"),
    [
        (0.0, 0.0, Arm.CHAMPION),
        (0.0, 0.1, Arm.CANDIDATE),
        (0.1, 0.1, Arm.CHAMPION),
        (0.9, 0.1, Arm.CONTROL),
        (0.5, 0.5, Arm.CONTROL),
        (0.499, 0.5, Arm.CANDIDATE),
        (1.0, 0.5, Arm.CONTROL),
    ],
)
def test_borders(place, weight, arm):
    assert arm_at(place, weight) is arm
