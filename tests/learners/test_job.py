import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from learners import adapter, artifact, dark, job, servable
from learners.base import as_json
from learners.encode import encode, key_of
from learners.ewc import Inert
from learners.order import Order
from learners.strategy import STRATEGIES
from replay.general import examples
from replay.records import Example, Split

LEARNING = {
    "strategy": "replay",
    "rank": 4,
    "alpha": 8,
    "dropout": 0.0,
    "learning_rate": 0.02,
    "epochs": 2,
    "batch_size": 4,
    "accumulation": 2,
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 64,
    "early_stopping_patience": 2,
    "der_alpha": 0.5,
    "der_beta": 0.5,
    "ewc_kappa": 1.0,
    "ewc_gamma": 0.95,
    "ewc_sequences": 512,
    "olora_lambda": 0.5,
    "seed": 0,
}
SPLITS = [Split.TRAIN] * 7 + [Split.VALIDATION] + [Split.HOLDOUT] * 2


def example(n, skill="desk", **changes):
    asked = ({"role": "user", "content": f"{skill} {n}"},)
    made = Example(f"{skill}{n}", f"i{n}", f"f{n}", "desk", skill, asked, "yes", SPLITS[n % 10])
    return replace(made, **changes)


def prepared(folder, base, *, examples, older=(), parent=None, kept=None, **learning):
    """A job's folder, as the daemon prepares it."""
    told = {"id": "j1", "line": "desk", "base": as_json(base), "parent": str(parent) if parent else None, "dtype": "float32"}
    told |= {} if kept is None else {"kept": kept}
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps({**told, "learning": {**LEARNING, **learning}}))
    for name, rows in (("examples.jsonl", examples), ("older.jsonl", older)):
        (folder / name).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(base, tmp_path):
    examples = [example(n) for n in range(20)] + [example(21, reply="<|im_end|>", id="bad")]
    older = [example(n, "old", split=Split.HOLDOUT) for n in range(3)] + [example(28)]
    return prepared(tmp_path / "j1", base, examples=examples, older=older)


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_older_examples_help_to_choose_a_checkpoint_and_are_not_trained_on(base, tmp_path, monkeypatch):
    older = [example(n, "old", split=split) for n, split in enumerate((Split.VALIDATION, Split.HOLDOUT, Split.VALIDATION))]
    folder, given = prepared(tmp_path / "j1", base, examples=[example(n) for n in range(20)], older=older), {}

    def fit(model, tokenizer, training, validation, *_, **__):
        given.update(training={e.key for e in training}, validation={e.key for e in validation})
        raise InterruptedError

    monkeypatch.setattr(job, "fit", fit)
    with pytest.raises(InterruptedError):
        job.run(folder)
    assert given["validation"] == {key_of(name) for name in ("desk7", "desk17", "old0", "old2")}
    assert given["training"] == {key_of(f"desk{n}") for n in range(20) if n % 10 < 7}


def test_a_job_from_start_to_finish(folder, base):
    job.run(folder)
    slices = read(folder, "evaluation.json")["slices"]
    assert {name: (body["is_new"], len(body["ids"])) for name, body in slices.items()} == {
        "desk": (True, 4),
        "desk (older)": (False, 1),
        "old": (False, 3),
    }
    for body in slices.values():
        assert body["base"] == body["champion"], "a line without champion is served by the base"
        assert all(len(body[who][what]) == len(body["ids"]) for who in ("base", "candidate") for what in ("exact", "loglik"))
    desk = slices["desk"]
    assert sum(desk["candidate"]["loglik"]) > sum(desk["base"]["loglik"])
    artifact.check(folder / "artifact", base, 16)
    manifest = read(folder, "artifact/manifest.json")
    assert manifest["job"] == "j1"
    assert len(manifest["examples"]) == 20
    assert "control tokens" in manifest["skipped"]["bad"]
    assert manifest["metrics"]["precision"] == "float32"
    assert read(folder, "progress.json")["phase"] == "done"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["artifact"]


GOLDEN = [
    {"suite": "core", "id": str(n), "messages": [{"role": "user", "content": f"desk {n}"}], "reply": "yes", "must_pass": n == 0}
    for n in range(3)
]


def test_golden_suites_neutral_texts_and_lengths_are_measured(folder):
    (folder / "suites.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOLDEN))
    told = {"looks": {"desk": 1, "suite:core": 4}, "suites": {"core": "d"}}
    (folder / "spec.json").write_text(json.dumps({**read(folder, "spec.json"), **told}))
    job.run(folder)
    found = read(folder, "evaluation.json")
    core = found["suites"]["core"]
    assert (core["ids"], core["must_pass"]) == (["0", "1", "2"], [True, False, False])
    assert core["base"] == core["champion"]
    assert sum(core["candidate"]["loglik"]) > sum(core["base"]["loglik"])
    assert found["kl"] > 0.01
    assert [len(found["lengths"][who]) for who in ("champion", "candidate")] == [7, 7], "four older examples, three golden"
    assert found["looks"] == told["looks"]
    assert read(folder, "artifact/manifest.json")["suites"] == {"core": "d"}
    assert not (folder / "neutral.safetensors").exists()


def test_a_golden_item_that_cannot_be_encoded_fails_the_job_by_its_name(folder):
    (folder / "suites.jsonl").write_text(json.dumps({**GOLDEN[1], "reply": "<|im_end|>"}))
    with pytest.raises(ValueError, match="'1' of the golden suite 'core'"):
        job.run(folder)


def test_the_fingerprint_tells_the_adapter_from_the_base(folder):
    job.run(folder)
    for probe in read(folder, "artifact/fingerprint.json")["probes"]:
        assert len(probe["adapter"]) == len(probe["base"]) == len(probe["token_ids"]) - 1
        assert probe["adapter"] != pytest.approx(probe["base"], abs=1e-3)


def test_the_next_version_starts_from_the_champion(folder, base):
    job.run(folder)
    first = read(folder, "evaluation.json")["slices"]
    champion = folder.parent / "v1"
    (folder / "artifact").rename(champion)
    (folder / "evaluation.json").unlink()
    (folder / "before.json").unlink()
    (folder / "spec.json").write_text(json.dumps({**read(folder, "spec.json"), "parent": str(champion)}))
    job.run(folder)
    second = read(folder, "evaluation.json")["slices"]
    for name, body in second.items():
        assert body["champion"]["loglik"] == pytest.approx(first[name]["candidate"]["loglik"], abs=1e-4)
        assert body["base"] == first[name]["base"]
    assert read(folder, "artifact/manifest.json")["parent"] == str(champion)


@pytest.mark.parametrize("part", ["weights", "tokenizer", "template"])
def test_t19_a_parent_that_was_made_for_another_base_is_refused_before_training(folder, base, part):
    """T19, §8.5.6. It fits, being of the same shape: attached and trained it would pass for this base's."""
    job.run(folder)
    again = prepared(folder.parent / "j2", base, examples=FIRST, parent=folder / "artifact")
    other = {**read(again, "spec.json"), "base": as_json(replace(base, **{f"{part}_digest": "another's"}))}
    (again / "spec.json").write_text(json.dumps(other))
    with pytest.raises(servable.Unservable, match=f"was made for another base: its {part} differ"):
        job.run(again)
    assert not (again / "trained").exists()
    (again / "spec.json").write_text(json.dumps({**other, "base": as_json(base)}))
    job.run(again)
    assert (again / "evaluation.json").exists(), "by its own base it is taken"


class Killed(BaseException):
    pass


def test_what_is_done_is_not_done_again(folder, monkeypatch):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(job, "_finish", die)
        with pytest.raises(Killed):
            job.run(folder)
    assert (folder / "trained" / servable.WEIGHTS).exists()
    trained = (folder / "trained" / servable.WEIGHTS).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(job, "fit", die)
        job.run(folder)
        assert (folder / "artifact" / servable.WEIGHTS).read_bytes() == trained
        job.run(folder)


FIRST, SECOND = [example(n, "planes") for n in range(20)], [example(n, "trains", reply="no!") for n in range(20)]


@pytest.fixture
def learn(base, tmp_path):
    """Run a job; its artifact is a version once somebody promotes it."""

    def learn(name, examples, parent=None, leaves=None, **learning):
        folder = prepared(tmp_path / name, base, examples=examples, parent=parent, **learning)
        if leaves:
            (folder / "spec.json").write_text(json.dumps({**read(folder, "spec.json"), "leaves": leaves}))
        job.run(folder)
        return folder / "artifact"

    return learn


def metrics(version):
    return read(version, "manifest.json")["metrics"]


def state_of(version):
    return artifact.consolidation(version)


def test_a_line_s_first_version_has_no_penalty_and_leaves_a_fisher_the_next_one_has_both(learn):
    first = learn("j1", FIRST, strategy="ewc")
    second = learn("j2", SECOND, first, strategy="ewc")
    assert "penalty" not in metrics(first)
    assert metrics(second)["penalty"] > 0
    old, new = state_of(first), state_of(second)
    assert old.keys() == new.keys()
    assert all((new[name] >= 0.95 * old[name]).all() and (new[name] != 0.95 * old[name]).any() for name in old)


def test_the_product_s_form_is_left_and_read_too(learn):
    first = learn("j1", FIRST, strategy="ewc", ewc_form="product")
    assert all(name.startswith("product.") for name in state_of(first))
    second = learn("j2", SECOND, first, strategy="ewc", ewc_form="product")
    assert metrics(second)["penalty"] > 0
    assert state_of(second)["product.tokens"] > state_of(first)["product.tokens"] * 1.5


def test_the_fisher_is_that_of_the_version_s_weights_on_what_it_learned_afresh(learn, base, tokenizer):
    """What it rehearses is in its champion's Fisher already."""
    remembered = [replace(e, source="remembered") for e in FIRST if e.split is Split.TRAIN]
    first = learn("j1", FIRST, strategy="ewc+replay")
    second = learn("j2", [*SECOND, *remembered], first, strategy="ewc+replay")
    model, _ = adapter.load_base(base.path, "float32")
    model = adapter.attach(model, second, rank=4, alpha=8, dropout=0.0, seed=0)
    fresh = [encode(tokenizer, list(e.messages), e.reply, 64) for e in SECOND if e.split is Split.TRAIN]
    again = STRATEGIES["ewc+replay"].consolidate(model, adapter.factors(model), state_of(first), fresh, 1, LEARNING)
    for name, f in state_of(second).items():
        assert torch.allclose(f, again[name], rtol=1e-3, atol=1e-6)


def test_a_version_s_state_is_a_function_of_its_champion_s_folder_and_its_own_examples(learn):
    """So what failed leaves nothing, and a roll-back restores."""
    first = learn("j1", FIRST, strategy="ewc")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    candidate = learn("j2", SECOND, first, strategy="ewc")
    learn("j3", FIRST, candidate, strategy="ewc")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    again = learn("j4", SECOND, first, strategy="ewc")
    for name in (servable.WEIGHTS, artifact.CONSOLIDATION):
        assert (again / name).read_bytes() == (candidate / name).read_bytes()
    assert any((state_of(candidate)[name] != f).any() for name, f in state_of(learn("j5", SECOND, strategy="ewc")).items())


def test_without_weight_it_is_the_strategy_beneath_to_the_bit(learn):
    first = learn("j1", FIRST, strategy="ewc")
    plain = learn("j2", SECOND, first, strategy="naive")
    weightless = learn("j3", SECOND, first, strategy="ewc", ewc_kappa=0.0)
    weighted = learn("j4", SECOND, first, strategy="ewc")
    assert (weightless / servable.WEIGHTS).read_bytes() == (plain / servable.WEIGHTS).read_bytes()
    assert (weighted / servable.WEIGHTS).read_bytes() != (plain / servable.WEIGHTS).read_bytes()
    assert state_of(weightless), "it still leaves a Fisher for a job that gives it weight"


def test_t16_a_weight_of_next_to_nothing_is_none_to_the_bit_but_for_what_is_told_of_it(learn):
    """T16. In single precision the penalty's gradient is lost in the loss's; that it changed nothing is said."""
    first = learn("j1", FIRST, strategy="ewc")
    none, next_to_none, one = (
        learn(f"k{n}", SECOND, first, strategy="ewc", ewc_kappa=kappa) for n, kappa in enumerate((0.0, 1e-12, 1.0))
    )
    assert (next_to_none / servable.WEIGHTS).read_bytes() == (none / servable.WEIGHTS).read_bytes()
    assert (one / servable.WEIGHTS).read_bytes() != (none / servable.WEIGHTS).read_bytes()
    assert 0 < metrics(next_to_none)["penalty"] < 1e-9 < metrics(one)["penalty"]
    assert metrics(next_to_none)["warning"].startswith("ewc_faint")
    assert "penalty" not in metrics(none)


def test_after_another_strategy_s_version_there_is_no_penalty(learn):
    first = learn("j1", FIRST, strategy="naive")
    assert "penalty" not in metrics(learn("j2", SECOND, first, strategy="ewc"))


REMEMBERED = [replace(e, source="remembered") for e in FIRST if e.split is Split.TRAIN]


def test_joint_for_once_on_a_line_of_ewc_leaves_a_fisher_of_all_that_it_learned(learn, base, tokenizer):
    """Where nothing is new, too; the champion's, which is of other factors, is gone."""
    first = learn("j1", SECOND, strategy="ewc")
    again = learn("j2", REMEMBERED, first, leaves="ewc", strategy="joint")
    model, _ = adapter.load_base(base.path, "float32")
    model = adapter.attach(model, again, rank=4, alpha=8, dropout=0.0, seed=0)
    learned = [encode(tokenizer, list(e.messages), e.reply, 64) for e in REMEMBERED]
    wanted = STRATEGIES["ewc"].consolidate(model, adapter.factors(model), {}, learned, 1, LEARNING)
    assert wanted.keys() == state_of(again).keys()
    for name, f in state_of(again).items():
        assert torch.allclose(f, wanted[name], rtol=1e-3, atol=1e-6)
    assert metrics(learn("j3", SECOND, again, strategy="ewc"))["penalty"] > 0
    assert not state_of(learn("j4", REMEMBERED, first, strategy="joint")), "nor has a line of joint anything to leave"


def test_joint_for_once_on_a_line_of_der_leaves_what_it_thinks_of_all_that_it_learned(learn):
    first = learn("j1", FIRST, strategy="der++")
    again = learn("j2", REMEMBERED, first, leaves="der++", strategy="joint")
    old, new = state_of(first), state_of(again)
    assert old.keys() == new.keys()
    assert any((old[name] != new[name]).any() for name in old)


def test_another_strategy_for_once_goes_on_with_the_chain_of_the_line(learn):
    first = learn("j1", FIRST, strategy="ewc")
    second = learn("j2", SECOND, first, leaves="ewc", strategy="naive")
    old, new = state_of(first), state_of(second)
    assert all((new[name] >= 0.95 * old[name]).all() and (new[name] != 0.95 * old[name]).any() for name in old)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: dict(list(state.items())[1:]),
        lambda state: {f"other.{name}": f for name, f in state.items()},
        lambda state: {name: 0 * f for name, f in state.items()},
    ],
    ids=["a factor is missing", "other names", "zero"],
)
def test_a_fisher_that_does_not_fit_fails_the_job_with_its_reason(learn, damage, tmp_path):
    first = learn("j1", FIRST, strategy="ewc")
    save_file(damage(state_of(first)), first / artifact.CONSOLIDATION)
    with pytest.raises(Inert, match="ewc_inert"):
        learn("j2", SECOND, first, strategy="ewc")
    assert not (tmp_path / "j2" / "artifact").exists()


REMEMBERED = [replace(e, source="remembered") for e in FIRST if e.split is Split.TRAIN]


def keys_of(version):
    return set(state_of(version)[dark.KEYS].tolist())


def test_a_version_leaves_what_it_thought_of_what_it_learned_and_its_champion_s_thoughts_of_what_is_kept(learn, base):
    """The champion's, not its own: what was rehearsed drifts, what was kept of it does not. What was erased is dropped."""
    first = learn("j1", FIRST, strategy="der++")
    assert keys_of(first) == {key_of(e.id) for e in REMEMBERED}
    plan = STRATEGIES["der++"].plan(SECOND, REMEMBERED, [], 0.5, 0)
    second = learn("j2", plan, first, strategy="der++")
    assert metrics(second)["distilled_examples"] == 7
    assert metrics(second)["divergence"] > 1e-3
    learned = {key_of(e.id) for e in SECOND if e.split is Split.TRAIN}
    assert keys_of(second) == keys_of(first) | learned
    assert_same(dark.joined(state_of(second), {}, keys_of(first)), state_of(first))
    erased, *others = sorted(e.id for e in (*REMEMBERED, *SECOND) if e.split is Split.TRAIN)
    third = learn("j3", plan, first, strategy="der++", kept=others)
    assert keys_of(third) == keys_of(second) - {key_of(erased)}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_divergence_it_is_rehearsal_to_the_bit(learn):
    first = learn("j1", FIRST, strategy="der++")
    plan = STRATEGIES["der++"].plan(SECOND, REMEMBERED, [], 0.5, 0)
    plain = learn("j2", plan, first, strategy="replay")
    weightless = learn("j3", plan, first, strategy="der++", der_alpha=0.0, der_beta=1.0)
    lighter = learn("j4", plan, first, strategy="der++", der_alpha=0.0, der_beta=0.9)
    assert (weightless / servable.WEIGHTS).read_bytes() == (plain / servable.WEIGHTS).read_bytes()
    assert (lighter / servable.WEIGHTS).read_bytes() != (plain / servable.WEIGHTS).read_bytes()


def test_a_first_job_has_nothing_to_think_of_and_one_that_rehearses_what_nobody_knew_is_warned_of(learn):
    """Liveness: a first job does not fail; nor does one after a champion of another strategy, but it is told."""
    first = learn("j1", FIRST, strategy="der++")
    assert "distilled_examples" not in metrics(first)
    assert read(first.parent, "evaluation.json")["warnings"] == []
    others = [replace(e, id=f"other-{e.id}") for e in REMEMBERED]
    second = learn("j2", STRATEGIES["der++"].plan(SECOND, others, [], 0.5, 0), first, strategy="der++")
    (warning,) = read(second.parent, "evaluation.json")["warnings"]
    assert warning == metrics(second)["warning"]
    assert warning.startswith("der_faint")


def test_what_several_parts_warn_of_is_told_and_how_the_penalty_grew(learn):
    first = learn("j1", FIRST, strategy="ewc+der++")
    others = [replace(e, id=f"other-{e.id}") for e in REMEMBERED]
    plan = STRATEGIES["der++"].plan(SECOND, others, [], 0.5, 0)
    second = learn("j2", plan, first, strategy="ewc+der++", ewc_kappa=1e-6)
    (warning,) = read(second.parent, "evaluation.json")["warnings"]
    assert "ewc_faint" in warning
    assert "der_faint" in warning
    course = metrics(second)["penalty_to_loss"]
    assert course["start"] == 0 < course["middle"] < 0.01
    assert course["end"] > 0


def test_both_kinds_of_state_lie_beside_each_other_and_each_strategy_reads_its_own(learn):
    first = learn("j1", FIRST, strategy="ewc+der++")
    plan = STRATEGIES["der++"].plan(SECOND, REMEMBERED, [], 0.5, 0)
    told = {name: metrics(learn(name, plan, first, strategy=name)) for name in ("ewc+der++", "ewc+replay")}
    has = {name: ("penalty" in one, "divergence" in one) for name, one in told.items()}
    assert has == {"ewc+der++": (True, True), "ewc+replay": (True, False)}


def test_a_job_that_dies_while_training_keeps_the_champion_as_its_anchor(learn, base, tmp_path, monkeypatch):
    first = learn("j1", FIRST, strategy="ewc", ewc_kappa=30.0)
    whole = learn("j2", SECOND, first, strategy="ewc", ewc_kappa=30.0)

    def die(told):
        if told.get("step") == 3:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(job, "_reporter", lambda _: die)
        with pytest.raises(Killed):
            learn("j3", SECOND, first, strategy="ewc", ewc_kappa=30.0)
    assert list((tmp_path / "j3" / "checkpoints").glob("checkpoint-2/COMPLETE"))
    job.run(tmp_path / "j3")
    resumed, wanted = (load_file(path / servable.WEIGHTS) for path in (tmp_path / "j3" / "artifact", whole))
    assert all(torch.allclose(resumed[name], wanted[name], atol=1e-5) for name in wanted)
    assert metrics(tmp_path / "j3" / "artifact")["penalty"] == pytest.approx(metrics(whole)["penalty"], rel=1e-3)


@pytest.mark.parametrize(("init", "rslora"), [("orthogonal", True), ("pissa", False)])
def test_each_beginning_ends_in_a_plain_lora_that_the_next_one_starts_from(learn, base, init, rslora):
    told = {"strategy": "naive", "init": init, "rslora": rslora, "learning_rate": 0.01}
    first = learn("j1", FIRST, **told)
    second = learn("j2", SECOND, first, **told)
    for version, slice_ in ((first, "planes"), (second, "trains")):
        artifact.check(version, base, 4)
        scores = read(version.parent, "evaluation.json")["slices"][slice_]
        assert sum(scores["candidate"]["loglik"]) > sum(scores["champion"]["loglik"]) + 1
    config = read(first, servable.CONFIG)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, rslora)
    weights = load_file(first / servable.WEIGHTS)
    for name, a in weights.items():
        if name.endswith("lora_A.weight"):
            b = weights[name.replace("lora_A", "lora_B")]
            assert init == "orthogonal" or torch.allclose(a @ a.T, b.T @ b, atol=1e-4), "balanced"


def test_general_examples_are_learned_and_named_by_id_and_source(learn):
    general = examples([{"messages": [{"role": "user", "content": f"count to {n}"}], "reply": str(n)} for n in range(7)], "desk")
    version = learn("j1", STRATEGIES["replay"].plan(FIRST, [], general, 0.5, 0))
    told = [row for row in read(version, "manifest.json")["examples"] if row["source"] == "general"]
    assert {row["id"] for row in told} == {e.id for e in general}
    assert set(read(version.parent, "evaluation.json")["slices"]) == {"planes"}
    without = learn("j2", STRATEGIES["replay"].plan(FIRST, [], [], 0.5, 0))
    assert (version / servable.WEIGHTS).read_bytes() != (without / servable.WEIGHTS).read_bytes()


def test_joint_training_starts_from_the_base_but_is_compared_with_the_champion(learn):
    first = learn("j1", FIRST, strategy="joint")
    second = learn("j2", SECOND, first, strategy="joint")
    afresh = learn("j3", SECOND, strategy="joint")
    assert (second / servable.WEIGHTS).read_bytes() == (afresh / servable.WEIGHTS).read_bytes()
    compared = read(second.parent, "evaluation.json")["slices"]["trains"]
    assert compared["champion"] != compared["base"]


def test_joint_training_is_a_single_pass_over_all_of_it_from_the_base_with_the_same_seed_and_order(learn):
    """Bit for bit: what an epoch deals from its sources, as one lesson in that order. In another order it is not."""
    first = learn("j1", FIRST, strategy="joint")
    plan = STRATEGIES["joint"].plan(SECOND, REMEMBERED, [], 0.5, 0)
    joint = learn("j2", plan, first, strategy="joint", epochs=1)
    trained = [e for e in plan if e.split is Split.TRAIN]
    dealt = [trained[place] for place in Order([1] * len(trained), 8, 0, [e.source for e in trained])]
    rest = [e for e in plan if e.split is not Split.TRAIN]
    at_once = [*(replace(e, source="fresh") for e in dealt), *rest]
    single = learn("j3", at_once, strategy="joint", epochs=1)  # the same fresh adapter, one lesson, no champion, no sources
    other = learn("j4", at_once[::-1], strategy="joint", epochs=1)
    warm = learn("j5", at_once, first, strategy="naive", epochs=1)
    assert (joint / servable.WEIGHTS).read_bytes() == (single / servable.WEIGHTS).read_bytes()
    assert all((one / servable.WEIGHTS).read_bytes() != (joint / servable.WEIGHTS).read_bytes() for one in (other, warm))


@pytest.mark.parametrize(("strategy", "rehearsed", "share"), [("replay", 7, 0.5), ("joint", 14, 1.0)])
def test_an_epoch_rehearses_by_the_ratio_what_the_plan_holds_for_all(base, tmp_path, monkeypatch, strategy, rehearsed, share):
    """Joint training learns all of it in each; the penalty is told of as many tokens as an epoch has."""
    examples = STRATEGIES[strategy].plan(SECOND, REMEMBERED, [], 1.0, 0)
    folder, given = prepared(tmp_path / "j1", base, examples=examples, strategy=strategy, replay_ratio=0.5), {}

    def fit(model, tokenizer, training, *rest):
        given.update(rehearsed=rest[-1], fresh=[e for e in training if e.source == "fresh"])
        given.update(remembered=[e for e in training if e.source == "remembered"])
        raise InterruptedError

    monkeypatch.setattr(job, "fit", fit)
    monkeypatch.setattr(job._Update, "_penalty", lambda _, items: given.update(items=items))
    with pytest.raises(InterruptedError):
        job.run(folder)
    tokens = {kind: sum(e.reply_length for e in given[kind]) for kind in ("fresh", "remembered")}
    assert len(given["remembered"]) == 14
    assert given["rehearsed"] == rehearsed
    assert given["items"] == tokens["fresh"] + share * tokens["remembered"]
