import math
import random

import pytest

from service.rollout.probe import MIN_EFFECT, MOST_NOISE, TOLERANCE, judge

BASE = [[-1.0, -2.0, -3.0], [-0.5, -4.0]]
EFFECT = [[0.8, -0.4, 1.2], [-0.2, 2.0]]


def add(left, right, scale=1.0):
    return [[a + scale * b for a, b in zip(x, y, strict=True)] for x, y in zip(left, right, strict=True)]


def fingerprint(adapter, base=BASE):
    return {
        "probes": [{"token_ids": list(range(len(a) + 1)), "adapter": a, "base": b} for a, b in zip(adapter, base, strict=True)]
    }


ADAPTER = add(BASE, EFFECT)


def test_the_same_measurements_are_the_same_adapter():
    result = judge(fingerprint(ADAPTER), ADAPTER, BASE)
    assert (result.ok, result.reason) == (True, None)
    assert result.distance_to_fingerprint == 0
    assert result.distance_to_base == pytest.approx(4.6 / 5)
    assert result.agreement == pytest.approx(1)


def test_what_engine_and_trainer_do_differently_to_both_is_forgiven():
    drift = [[0.1, -0.1, 0.1], [-0.1, 0.1]]
    result = judge(fingerprint(ADAPTER), add(ADAPTER, drift), add(BASE, drift))
    assert result.ok
    assert result.distance_to_fingerprint == pytest.approx(0.1)
    assert result.agreement == pytest.approx(1)


def test_an_adapter_that_was_skipped_does_nothing():
    assert judge(fingerprint(ADAPTER), BASE, BASE).reason == "noop_adapter"
    assert judge(fingerprint(ADAPTER), add(BASE, EFFECT, 0.1), BASE).reason == "noop_adapter"


def test_an_adapter_that_was_trained_on_nothing_does_nothing():
    faint = add(BASE, EFFECT, MIN_EFFECT / 2)
    assert judge(fingerprint(faint), faint, BASE).reason == "noop_adapter"


def test_another_adapter_is_told_by_its_direction():
    assert judge(fingerprint(ADAPTER), add(BASE, EFFECT, -1), BASE).reason == "fingerprint_mismatch"
    small, crossed = add(BASE, EFFECT, 0.1), add(BASE, [[-0.04, -0.08, 0.0], [0.0, 0.0]])
    result = judge(fingerprint(small), crossed, BASE)
    assert result.distance_to_fingerprint < TOLERANCE  # distance alone would let it pass
    assert result.reason == "fingerprint_mismatch"


def test_half_of_the_layers_are_not_enough():
    result = judge(fingerprint(ADAPTER), add(BASE, EFFECT, 0.5), BASE)
    assert result.reason == "fingerprint_mismatch"


def test_the_tolerance_is_a_border():
    off = add(ADAPTER, [[0.2, 0.2, 0.2], [0.2, 0.2]])
    assert not judge(fingerprint(ADAPTER), off, BASE).ok
    assert judge(fingerprint(ADAPTER), off, BASE, tolerance=0.21).ok


def rounded(on_base, on_adapter, effect=0.5, tokens=400):
    """A fingerprint, and what an engine says of that adapter, another one and the base, off by so many nats a token on average."""
    chance = random.Random(0)

    def draw(size):
        return [[chance.gauss(0, size * math.sqrt(math.pi / 2)) for _ in range(tokens)]]

    base, told, other = [[-2.0] * tokens], draw(effect), draw(effect)
    seen, seen_other = (add(add(base, what), draw(on_adapter)) for what in (told, other))
    return fingerprint(add(base, told), base), seen, seen_other, add(base, draw(on_base))


def test_an_engine_that_rounds_its_inputs_may_be_twice_as_far_off_as_on_the_base():
    told, seen, other, base = rounded(0.14, 0.22)  # about as int8 rounds
    result = judge(told, seen, base)
    assert result.distance_to_fingerprint > TOLERANCE
    assert result.ok
    assert judge(told, other, base).reason == "fingerprint_mismatch"
    assert (
        judge(told, seen, rounded(0.01, 0)[3]).reason == "fingerprint_mismatch"
    )  # an engine that hardly rounds has no such excuse


def test_what_is_too_far_off_for_rounding_is_another_base():
    told, seen, _, base = rounded(3 * MOST_NOISE, 3 * MOST_NOISE, effect=3)
    result = judge(told, seen, base)
    assert result.agreement == pytest.approx(1, abs=0.1)
    assert result.reason == "fingerprint_mismatch"


@pytest.mark.parametrize(
    ("told", "seen", "seen_base"),
    [
        ({"probes": []}, [], []),
        (fingerprint(ADAPTER), ADAPTER[:1], BASE),
        (fingerprint(ADAPTER), ADAPTER, BASE[:1]),
    ],
)
def test_sizes_must_agree(told, seen, seen_base):
    result = judge(told, seen, seen_base)
    assert (result.ok, result.reason) == (False, "fingerprint_invalid")
    assert "tokens" in result.detail


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_proves_nothing(value):
    broken = [[value, *ADAPTER[0][1:]], ADAPTER[1]]
    assert judge(fingerprint(ADAPTER), broken, BASE).reason == "not_finite"
    assert judge(fingerprint(broken), ADAPTER, BASE).reason == "not_finite"
