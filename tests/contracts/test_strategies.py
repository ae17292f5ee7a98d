"""Every strategy that there is, found by itself and led through the same life: learn, die, resume, be rejected, promoted, taken back."""

import gc
import json
import pickle
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from learners import adapter, artifact, job, servable
from learners.base import as_json
from learners.evaluate import logprobs
from learners.strategy import STRATEGIES
from replay import memory
from replay.records import Example, Split
from service.settings import Learning
from tests.service.world import LINE, QUICK, World

SHAPE = {"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 7}
LEARNING = {**SHAPE, "learning_rate": 0.05, "epochs": 1, "batch_size": 2, "accumulation": 1, "max_length": 64}
SPLITS = [Split.TRAIN] * 6 + [Split.HOLDOUT] * 2


def lesson(skill, reply):
    asked = [({"role": "user", "content": f"{skill} {n}"},) for n in range(8)]
    return [Example(f"{skill}{n}", f"i{n}", f"f{n}", "desk", skill, asked[n], reply, SPLITS[n]) for n in range(8)]


FIRST, SECOND = lesson("planes", "yes"), lesson("trains", "no!")
REMEMBERED = [replace(e, source="remembered") for e in FIRST if e.split is Split.TRAIN]


class Killed(BaseException):
    pass


def prepared(folder, base, name, examples, parent):
    told = {"id": folder.name, "line": "desk", "base": as_json(base), "parent": str(parent) if parent else None}
    told |= {"dtype": "float32", "learning": Learning(strategy=name, **LEARNING).model_dump(mode="json")}
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(told))
    (folder / "examples.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in examples))
    (folder / "older.jsonl").touch()
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lived(name, base, folder):
    """The life: a first version; a second one from it; the same again, from the first once more, with a death between."""
    strategy, starts, fit = STRATEGIES[name], [], job.fit
    plans = [strategy.plan(FIRST, [], [], 0.5, 0), strategy.plan(SECOND, REMEMBERED, [], 0.5, 0)]

    def watched(model, *args):
        starts.append([logprobs(model, probe["token_ids"]) for probe in probes])
        return fit(model, *args)

    def dying(told):
        if told.get("step") == told.get("steps", 0):
            raise Killed

    first = prepared(folder / "first", base, name, plans[0], None)
    job.run(first)
    probes = json.loads((first / "artifact" / artifact.FINGERPRINT).read_text())["probes"]
    before = contents(first / "artifact")
    second, again = (prepared(folder / n, base, name, plans[1], first / "artifact") for n in ("second", "again"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "fit", watched)
        job.run(second)
        with pytest.MonkeyPatch.context() as deadly:
            deadly.setattr(job, "_reporter", lambda _: dying)
            with pytest.raises(Killed):
                job.run(again)
        was_saved = [path.parent.name for path in (again / "checkpoints").glob("*/COMPLETE")]
        job.run(again)
    return SimpleNamespace(
        name=name, strategy=strategy, first=first, second=second, again=again, before=before, probes=probes, starts=starts,
        was_saved=was_saved, base=base,
    )  # fmt: skip


@pytest.fixture(scope="module")
def still():
    """A trainer's end collects garbage; over all that has been imported that takes as long as the training itself."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=STRATEGIES)
def life(request, base, still, tmp_path_factory):
    return lived(request.param, base, tmp_path_factory.mktemp("life"))


def measured(folder):
    return json.loads((folder / "evaluation.json").read_text())["slices"]


def test_it_learns_and_what_it_makes_is_served(life):
    for folder in (life.first, life.second):
        artifact.check(folder / "artifact", life.base, SHAPE["rank"])
    config = json.loads((life.second / "artifact" / servable.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (SHAPE["rank"], SHAPE["alpha"])
    told = measured(life.second)["trains"]
    assert sum(told["candidate"]["loglik"]) > sum(told["champion"]["loglik"]) + 1


def test_it_starts_where_the_champion_stands_or_else_from_the_base(life):
    whose = "base" if life.strategy.is_from_base else "adapter"
    for start in life.starts[:2]:
        for found, probe in zip(start, life.probes, strict=True):
            assert found == pytest.approx(probe[whose], abs=1e-3)
            assert found != pytest.approx(probe["base" if whose == "adapter" else "adapter"], abs=1e-2)


def test_a_candidate_that_is_rejected_leaves_every_byte_as_it_was(life):
    assert contents(life.first / "artifact") == life.before


def test_taken_back_to_its_parent_a_line_learns_the_same_again_even_across_a_death(life):
    """The seed says all, and the state is the parent's: nothing of the version between has reached it."""
    assert life.was_saved
    for file in (servable.WEIGHTS, artifact.CONSOLIDATION):
        paths = [folder / "artifact" / file for folder in (life.second, life.again)]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            whole, resumed = map(load_file, paths)
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(whole[n], resumed[n]) for n in whole), file


def test_what_a_promoted_version_leaves_is_what_the_next_job_reads_also_through_pickle(life):
    """A strategy has no state of its own: a copy in another process plans, penalises and consolidates alike."""
    copy = pickle.loads(pickle.dumps(life.strategy))
    assert copy.plan(SECOND, REMEMBERED, [], 0.5, 3) == life.strategy.plan(SECOND, REMEMBERED, [], 0.5, 3)
    settings = Learning(strategy=life.name, **LEARNING).model_dump()
    model, tokenizer = adapter.load_base(life.base.path, "float32")
    data = job._Data(life.second, tokenizer, 64)
    model = adapter.attach(model, life.second / "artifact", **SHAPE)
    left, before = (artifact.consolidation(folder / "artifact") for folder in (life.second, life.first))
    found = copy.consolidate(model, adapter.factors(model), before, data.of("train", "fresh"), 1, settings)
    assert found.keys() == left.keys()
    assert all(torch.allclose(found[n].double(), left[n].double(), rtol=1e-3, atol=1e-4) for n in left)
    penalty = copy.penalty(adapter.factors(model), left, 10, settings)
    assert (penalty is not None) == ("ewc" in life.name)
    distillation = copy.distillation(data.of("train"), left, settings)
    assert (distillation is not None) == ("der++" in life.name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_promoted_and_rolled_back_a_line_has_the_buffer_of_its_version_and_plans_as_if_nothing_had_been(name, tmp_path):
    """Whatever the strategy: what the version between learned is neither remembered nor rehearsed, until it is the champion again."""
    lines = {LINE: {**QUICK["lines"][LINE], "learning": {"strategy": name}}}
    world = World(tmp_path, {"lines": lines})

    def learned(version, slice):
        world.demonstrate(40, slice)
        world.until(lambda w: w.trial is not None and w.trial.candidate == version)
        world.conductor.promote(LINE)
        world.until(lambda w: w.champion == version)
        return [example.id for example in world.read(lambda conn: memory.remembered(conn, LINE, 100))]

    first, second = learned("desk@v1", "planes"), learned("desk@v2", "trains")
    world.conductor.roll_back(LINE)
    assert [example.id for example in world.read(lambda conn: memory.remembered(conn, LINE, 100))] == first
    world.demonstrate(40, "ships")
    world.until(lambda w: w.job.id == "desk-job3" and w.job.started_at is not None)
    rows = [json.loads(row) for row in (tmp_path / "jobs" / "desk-job3" / "examples.jsonl").read_text().splitlines()]
    older = {row["id"] for row in rows if row["source"] == "remembered"}
    assert older <= set(first) < set(second)
    assert bool(older) == bool(STRATEGIES[name].plan(SECOND, REMEMBERED, [], 0.5, 0)[len(SECOND) :])
    assert {row["slice"] for row in rows} == ({"planes", "ships"} if older else {"ships"})
    world.until(lambda w: w.trial.candidate == "desk@v3")
    world.conductor.roll_back(LINE)
    world.until(lambda w: not w.trial.stage.is_open)
    world.conductor.roll_back(LINE, "desk@v2")
    world.until(lambda w: w.champion == "desk@v2")
    assert [example.id for example in world.read(lambda conn: memory.remembered(conn, LINE, 100))] == second
    world.writer.close()
