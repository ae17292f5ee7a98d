"""Near duplicates: found when alike (recall at J ≥ 0.9), left alone when not (J ≤ 0.5); templates do not count."""

import random

import pytest

from replay.similarity import FEWEST, bands, boilerplate, jaccard, packed, share_a_run, shingles, unpacked, winnowed

TEMPLATE = "You are the desk of an airline. Read what the customer writes with great care and say in one word what it is about: "


def words(rng, number):
    return [f"w{rng.randrange(5000)}" for _ in range(number)]


def pair_with(rng, target, size=200):
    """Two sets of shingles with about this Jaccard."""
    shared = round(2 * size * target / (1 + target))
    numbers = [rng.getrandbits(62) for _ in range(2 * size)]
    return set(numbers[:size]), set(numbers[size - shared : 2 * size - shared])


@pytest.mark.parametrize(("target", "least", "most"), [(0.9, 0.95, 1.0), (0.6, 0.95, 1.0), (0.02, 0.0, 0.01)])
def test_pairs_meet_by_how_alike_they_are(target, least, most):
    rng = random.Random(0)
    pairs = [pair_with(rng, target) for _ in range(200)]
    met = sum(bool(set(bands(one, "desk")) & set(bands(other, "desk"))) for one, other in pairs) / len(pairs)
    assert least <= met <= most


def test_few_wide_bands_would_miss_what_is_alike():
    """Control: 9 bands of 13, as they are chosen for a threshold of 0.8, find too few pairs at 0.9."""
    assert 1 - (1 - 0.9**13) ** 9 < 0.95 < 1 - (1 - 0.9**4) ** 32


def test_lines_do_not_meet():
    one = set(range(100))
    assert bands(one, "desk") == bands(one, "desk")
    assert not set(bands(one, "desk")) & set(bands(one, "shop"))
    assert bands(set(range(FEWEST - 1)), "desk") == []


def test_jaccard():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard(set(), set()) == 0


def test_a_template_is_what_many_share_and_does_not_make_questions_alike():
    rng = random.Random(1)
    prompts = [shingles(TEMPLATE + " ".join(words(rng, 4))) for _ in range(40)]
    template = boilerplate(prompts[:32])
    one, other = (set(prompt) for prompt in prompts[-2:])
    assert jaccard(one, other) > 0.6  # control: with the template they look alike
    assert jaccard(one - template, other - template) < 0.1
    assert boilerplate(prompts[:15]) == frozenset()


def test_thirteen_words_in_a_row_are_always_met_and_twelve_are_not_enough():
    rng = random.Random(2)
    for length, is_shared in ((13, True), (12, False)):
        for _ in range(50):
            common = words(rng, length)
            one, other = (shingles(" ".join([*words(rng, 30), *common, *words(rng, 30)])) for _ in range(2))
            assert share_a_run(one, other, ()) is is_shared
            if is_shared:
                assert set(winnowed(one, (), "desk")) & set(winnowed(other, (), "desk"))


def test_a_run_of_the_template_alone_is_not_shared():
    rng = random.Random(3)
    prompts = [shingles(TEMPLATE + " ".join(words(rng, 20))) for _ in range(32)]
    template = boilerplate(prompts)
    assert share_a_run(prompts[0], prompts[1], ())
    assert not share_a_run(prompts[0], prompts[1], template)
    assert not set(winnowed(prompts[0], template, "desk")) & set(winnowed(prompts[1], template, "desk"))


def test_short_and_empty_texts():
    assert len(shingles("two words")) == 1
    assert shingles("?!") == ()
    assert unpacked(packed(shingles("a b c d e f"))) == shingles("a b c d e f")
