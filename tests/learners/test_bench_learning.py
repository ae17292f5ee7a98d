"""The benchmark of forgetting, on the tiny base: the same jobs, tables and pictures, no real model."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from replay.records import Split

FILE = Path(__file__).parents[2] / "benchmarks" / "learning.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_learning", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module
    sys.path.insert(0, str(FILE.parent))  # as for a script: it finds its neighbours
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FILE.parent))
    del sys.modules[spec.name]


def run_in(bench, folder, **changes):
    told = {"tasks": ["debian", "spam"], "seed": 0, "rows": 8, "tests": 4, "texts": bench.texts(0), **changes}
    folder.mkdir(exist_ok=True)
    return bench.Run(folder, **told)


def test_each_task_has_texts_for_the_largest_run_and_is_balanced(bench):
    for task, texts in bench.texts(1).items():
        assert len(texts) >= 300, task
        labels = [text.label for text in texts[:200]]
        assert max(map(labels.count, set(labels))) - min(map(labels.count, set(labels))) <= 1


def test_what_is_measured_is_never_learned(bench, tmp_path):
    run = run_in(bench, tmp_path)
    examples = run.examples("spam")
    taught, exam = ({e.messages[0]["content"] for e in examples if e.split is s} for s in (Split.TRAIN, Split.HOLDOUT))
    assert (len(taught), len(exam), taught & exam) == (8, 4, set())


def test_the_floor_learns_what_words_tell_and_nothing_else(bench, tmp_path):
    run = run_in(bench, tmp_path, rows=80, tests=60)
    rows = run.examples("reviews")
    taught, exam = ([e for e in rows if e.split is s] for s in (Split.TRAIN, Split.HOLDOUT))
    assert bench.regression(taught, taught) > 0.95
    assert 0.6 < bench.regression(taught, exam) < 0.95


def own_floor(bench, run, task):
    rows = run.examples(task)
    return bench.regression(*([e for e in rows if e.split is s] for s in (Split.TRAIN, Split.HOLDOUT)))


def test_it_compares_strategies_and_goes_on_where_it_stopped(bench, base, tmp_path):
    run, said = run_in(bench, tmp_path), []
    prompts = bench.neutral(2)
    found = bench.compare(run, ["naive", "ewc+replay", "joint"], base, prompts, said.append)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1-debian-first", "2-spam-ewc+replay", "2-spam-joint", "2-spam-naive"]
    assert found["strategies"]["naive"]["matrix"][0] == found["strategies"]["ewc+replay"]["matrix"][0]
    assert all(told["kl_to_base"] > 0 and told["tokens_per_second"] > 0 for told in found["strategies"].values())
    assert found["lr"] == {task: own_floor(bench, run, task) for task in run.tasks}
    again = bench.compare(run, ["naive", "ewc+replay", "joint"], base, prompts, said.append)
    assert again == found
    assert ["(kept)" in line for line in said] == [False, False, True, False, False] + [True] * 5
    options = argparse.Namespace(suite="desk-5", tasks=2, rows=8, tests=4, orders=1, seeds=1)
    told = json.loads(json.dumps(bench.summary([found], options)))
    assert set(told["strategies"]) == {"naive", "ewc+replay"}
    assert {"aa", "bwt", "forgetting", "kl_to_base", "tokens_per_second", "seconds", "bytes"} <= set(told["strategies"]["naive"])
    assert set(told["base"]) == set(told["lr8"]) == {"aa", "debian", "spam"}
    assert len(list(bench.table(told, "lr8"))) == 6
    assert [path.name for path in bench.draw([found], tmp_path)][-1] == "curves.png"
