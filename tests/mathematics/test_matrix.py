"""The definitions, pinned by worked matrices and a published log; variants found in public code must differ."""

from random import Random
from statistics import mean

import pytest

from learners.matrix import FADING, History, Prequential, transfer

FALLING = [[0.98, 0.10, 0.20], [0.90, 0.57, 0.25], [0.80, 0.50, 0.72]]
MIXED = [[0.50, 0.10, 0.20], [0.70, 0.40, 0.30], [0.60, 0.55, 0.80]]
BASE, JOINT = [0.05, 0.20, 0.10], [0.70, 0.60, 0.85]


@pytest.mark.parametrize(
    ("scores", "average", "backward", "forward", "forgetting", "intransigence"),
    [(FALLING, 0.67333, -0.125, 0.025, 0.125, 0.13), (MIXED, 0.65, 0.125, 0.05, -0.025, 0.05)],
    ids=["falling", "mixed"],
)
def test_worked_matrices(scores, average, backward, forward, forgetting, intransigence):
    found = transfer(scores, BASE, JOINT)
    assert found.average == pytest.approx(average, abs=1e-5)
    assert found.backward == pytest.approx(backward)
    assert found.forward == pytest.approx(forward)
    assert found.forgetting == pytest.approx(forgetting)
    assert found.intransigence == pytest.approx(intransigence)


def learned(scores, j):
    return scores[j][j]


WRONG = {
    "backward over all tasks (SAPT)": ("backward", lambda r: sum(r[-1][j] - learned(r, j) for j in range(3)) / 3),
    "backward as a loss (TRACE)": ("backward", lambda r: mean(learned(r, j) - r[-1][j] for j in range(2))),
    "the best of all versions, the last one too (Mammoth)": (
        "forgetting",
        lambda r: mean(max(r[t][j] for t in range(j, 3)) - r[-1][j] for j in range(2)),
    ),
    "the first score, not the best (Avalanche)": ("forgetting", lambda r: mean(learned(r, j) - r[-1][j] for j in range(2))),
    "forward without the base": ("forward", lambda r: mean(r[j - 1][j] for j in (1, 2))),
    "forward after learning (SAPT)": ("forward", lambda r: mean(learned(r, j) - BASE[j] for j in range(3))),
    "average over the diagonal": ("average", lambda r: mean(learned(r, j) for j in range(3))),
    "intransigence over all tasks": ("intransigence", lambda r: mean(JOINT[j] - r[-1][j] for j in range(3))),
    "intransigence as a gain": ("intransigence", lambda r: r[-1][2] - JOINT[2]),
}


@pytest.mark.parametrize(("name", "wrong"), WRONG.values(), ids=WRONG)
def test_other_definitions_are_other_numbers(name, wrong):
    assert getattr(transfer(MIXED, BASE, JOINT), name) != pytest.approx(wrong(MIXED), abs=1e-3)


NAN = float("nan")


@pytest.mark.parametrize(
    ("first", "last", "average", "backward"),
    [
        ([98.71, 57.76, 71.91, 88.62], [97.74, 56.07, 71.04, 88.62], 78.37, -1.18),
        ([97.01, 55.25, 72.28, 90.03], [79.53, 52.67, 48.84, 90.03], 67.77, -14.50),
        ([98.71, 57.01, 72.38, 90.01], [79.50, 40.82, 64.14, 90.01], 68.62, -14.55),
    ],
    ids=["O-LoRA", "full fine-tuning", "one LoRA after the other"],
)
def test_the_log_that_o_lora_s_authors_published(first, last, average, backward):
    """DBpedia, Amazon, Yahoo, AG News with T5-large. Both read the diagonal and the last row alone: the rest is unknown."""
    rows = [[first[j] if j == t else NAN for j in range(4)] for t in range(3)]
    found = transfer([*rows, last], [0.0] * 4)
    assert found.average == pytest.approx(average, abs=0.005)
    assert found.backward == pytest.approx(backward, abs=0.005)


def test_a_line_learns_a_slice_when_it_comes_and_may_have_more_versions_than_slices():
    scores = [[0.8, 0.1], [0.85, 0.2], [0.7, 0.6], [0.75, 0.5]]
    found = transfer(scores, [0.1, 0.05], [0.9, 0.9], learned=[0, 2])
    assert found.average == pytest.approx(0.625)
    assert found.backward == pytest.approx(((0.75 - 0.8) + (0.5 - 0.6)) / 2)
    assert found.forward == pytest.approx(0.2 - 0.05)
    assert found.forgetting == pytest.approx(((0.85 - 0.75) + (0.6 - 0.5)) / 2)
    assert found.intransigence == 0, "the last version learned no slice for the first time"


def test_one_task_forgets_nothing():
    found = transfer([[0.7]], [0.1])
    assert (found.backward, found.forward, found.forgetting, found.intransigence) == (0, 0, 0, None)


@pytest.mark.parametrize(
    "shapes",
    [
        {"scores": [[1.0, 2.0], [1.0]], "base": [0.0, 0.0]},
        {"scores": [[1.0, 2.0]], "base": [0.0, 0.0]},
        {"scores": [[1.0]], "base": [0.0, 0.0]},
        {"scores": [[1.0]], "base": [0.0], "joint": [0.0, 0.0]},
        {"scores": [[1.0, 2.0]], "base": [0.0, 0.0], "learned": [0]},
        {"scores": [], "base": []},
    ],
)
def test_a_matrix_of_another_shape_is_refused(shapes):
    with pytest.raises(ValueError, match="square"):
        transfer(**shapes)


def test_joint_training_counts_where_it_has_learned_all_that_the_last_version_did_first():
    first = History().extended("v1", {}, {"a": 0.8}, {"a": 0.1})
    both = first.extended("v2", {"b": 0.2, "c": 0.1}, {"a": 0.7, "b": 0.6, "c": 0.5}, {"b": 0.1, "c": 0.1})
    bound = {"a": 0.1, "b": 0.9, "c": 0.6, "d": 0.0}
    found = [h.transfer(joint) for h, joint in ((both, bound), (both, {"a": 0.9, "b": 0.9}), (both, None), (first, {"a": 0.9}))]
    assert [one and one.intransigence for one in found] == [pytest.approx(0.2), None, None, pytest.approx(0.1)]
    older = both.extended("v3", {}, {"a": 0.7, "b": 0.6, "c": 0.5}, {}).transfer(bound)
    assert older is not None
    assert older.intransigence is None, "it learned nothing first: there is nothing to compare"
    assert both.last() == {"a": 0.7, "b": 0.6, "c": 0.5}
    assert History().last() == {}


STREAM = [0.0, 1.0, 0.0, 1.0, 1.0]


def faded(scores, fading):
    """The direct sum of Gama et al.: Σ α^(n-i) e_i / Σ α^(n-i)."""
    weights = [fading ** (len(scores) - i) for i in range(1, len(scores) + 1)]
    return sum(w * e for w, e in zip(weights, scores, strict=True)) / sum(weights)


def test_a_worked_stream():
    found = Prequential().extended(STREAM, fading=0.5)
    assert found.items == 5
    assert found.mean == pytest.approx(0.6)
    assert found.weight == pytest.approx(1.9375)
    assert found.faded == pytest.approx((0.125 + 0.5 + 1) / 1.9375)


@pytest.mark.parametrize("fading", [1.0, FADING, 0.9])
def test_the_recursion_is_the_direct_sum_however_the_stream_is_cut(fading):
    random = Random(0)
    stream = [random.random() for _ in range(1000)]
    found, start = Prequential(), 0
    while start < len(stream):
        size = random.randrange(40)
        found = Prequential.from_json(found.extended(stream[start : start + size], fading).as_json())
        start += size
    assert found.items == len(stream)
    assert found.mean == pytest.approx(mean(stream), abs=1e-12)
    assert found.faded == pytest.approx(faded(stream, fading), abs=1e-12)


WRONG_STREAMS = {
    "the mean of batches' means": lambda s: mean([mean(s[:4]), mean(s[4:])]),
    "the last batch alone": lambda s: mean(s[4:]),
    "never divided by the weights": lambda s: sum(0.5 ** (len(s) - i) * e for i, e in enumerate(s, 1)),
    "the oldest weighs most": lambda s: faded(s[::-1], 0.5),
    "an exponential mean from 0": lambda s: sum(0.5 ** (len(s) - i + 1) * e for i, e in enumerate(s, 1)),
}


@pytest.mark.parametrize("wrong", WRONG_STREAMS.values(), ids=WRONG_STREAMS)
def test_other_means_of_a_stream_are_other_numbers(wrong):
    found = Prequential().extended(STREAM[:4], 0.5).extended(STREAM[4:], 0.5)
    assert wrong(STREAM) not in (pytest.approx(found.mean, abs=1e-3), pytest.approx(found.faded, abs=1e-3))


def test_a_stream_without_examples_has_no_score():
    assert Prequential().extended([]).as_json() == {"items": 0, "mean": None, "faded": None, "weight": 0.0}
    assert Prequential.from_json(Prequential().as_json()) == Prequential.from_json(None) == Prequential()
