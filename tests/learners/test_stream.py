"""The order of the strategies on a fast stream of made-up lessons (`benchmarks/_synthetic.py`), by jobs as the daemon's.

Scores are mean log-probabilities of right replies to questions that were not learned, in nats a token. How far apart the systems are
over more seeds stands in docs/log.md. A regression test, not a benchmark: the real one is `learnd bench learning`.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from replay.records import Split

FILE = Path(__file__).parents[2] / "benchmarks" / "_synthetic.py"
SPEC = importlib.util.spec_from_file_location("bench_synthetic", FILE)
synthetic = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)  # dataclasses look for their module
SPEC.loader.exec_module(synthetic)
SEEDS = (0, 1)
BESIDE = {"ewc κ=1"}
"""What the bench has beside the order."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # its products are too small to share
    streams = {kind: [name for name in names if name not in BESIDE] for kind, names in synthetic.STREAMS.items()}
    yield synthetic.compared(tmp_path_factory.mktemp("stream"), SEEDS, streams, lambda _: None)
    torch.set_num_threads(before)


@pytest.mark.parametrize("claim", synthetic.CLAIMS, ids=str)
def test_the_strategies_are_in_order(found, claim):
    assert found.holds(claim), "\n".join(["", *found.table()])


def test_all_are_better_than_the_base(found):
    base = found.mean("joint", "base")
    assert all(found.mean(name, "average", stream) > base for stream, name in found.figures), "\n".join(["", *found.table()])


def test_without_any_it_forgets_what_it_had_learned(found):
    for stream in synthetic.STREAMS:
        assert found.mean("naive", "backward", stream) < -0.5, "\n".join(["", *found.table()])
        assert found.mean("naive", "gain", stream) > 1, "\n".join(["", *found.table()])


def test_lessons_contradict_each_other_or_have_nothing_in_common():
    def keys(kind):
        lessons = synthetic.Stream(Path(), None, kind, 0).lessons()
        return [{e.messages[0]["content"].split()[1] for e in lesson} for lesson in lessons]

    first, *others = keys("shared")
    assert all(other == first for other in others)
    assert len(set.union(*keys("disjoint"))) == synthetic.LESSONS * synthetic.KEYS


def test_what_is_measured_is_right_and_was_never_asked():
    for lesson in synthetic.Stream(Path(), None, "shared", 0).lessons():
        taught, exam = ([e for e in lesson if e.split is split] for split in (Split.TRAIN, Split.HOLDOUT))
        assert (len(taught), len(exam)) == (synthetic.ROWS, synthetic.TESTS)
        assert not {e.messages[0]["content"] for e in taught} & {e.messages[0]["content"] for e in exam}
        right = {e.messages[0]["content"].split()[1]: e.reply for e in exam}
        assert all(right[e.messages[0]["content"].split()[1]] == e.reply for e in exam)
        wrong = sum(right[e.messages[0]["content"].split()[1]] != e.reply for e in taught)
        assert 0.1 < wrong / len(taught) < 0.3


def test_a_claim_is_a_difference_of_pairs():
    rows = {("shared", "a"): [{"gain": 1.0}, {"gain": 3.0}], ("shared", "b"): [{"gain": 1.0}, {"gain": 2.0}]}
    told, claim = synthetic.Found(rows), synthetic.Claim("a", "b", "gain", share=0.5)
    assert told.differences(claim) == [0.5, 2.0]
    assert told.holds(claim)
    assert not told.holds(synthetic.Claim("b", "a", "gain"))
    assert [line.split()[-5:] for line in told.table([claim])][-1] == ["least", "+0.500,", "2", "of", "2"]
