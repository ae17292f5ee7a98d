"""The penalty against closed forms, what stands in the optimiser's step, and its guards."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from learners import adapter, trainer
from learners.encode import encode, token_losses
from learners.ewc import Ewc, Inert, Penalty
from learners.fisher import fisher
from learners.naive import Naive
from learners.trainer import fit

SETTINGS = {
    "learning_rate": 0.02,
    "epochs": 1,
    "batch_size": 8,
    "accumulation": 1,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "early_stopping_patience": 0,
    "seed": 3,
    "ewc_kappa": 1.0,
    "ewc_gamma": 0.95,
    "ewc_sequences": 512,
}


class Quadratic:
    """A task of n tokens whose mean loss is ½ Σ a (θ − t)²: its Fisher per token is a, and everything has a closed form."""

    def __init__(self, n, a, t):
        self.n, self.a, self.t = n, torch.tensor(a, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)

    def loss(self, theta):
        return (self.a * (theta - self.t) ** 2).sum() / 2


TASKS = [Quadratic(100, [3.0, 0.1], [1.0, -2.0]), Quadratic(40, [0.5, 2.0], [-1.0, 4.0]), Quadratic(250, [1.0, 1.0], [6.0, 0.0])]


def joint(tasks):
    total = sum(task.n * task.a for task in tasks)
    return sum(task.n * task.a * task.t for task in tasks) / total


def minimise(theta, loss):
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([theta], max_iter=200, **exact)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def learned_in_turn(tasks, kappa=1.0, tokens=lambda task: task.n):
    """Where the strategy ends that learns the tasks one after the other, γ being 1."""
    theta, state = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), {}
    for task in tasks:
        penalty = Ewc(Naive()).penalty({"t": theta}, state, tokens(task), {"ewc_kappa": kappa})
        minimise(theta, lambda task=task, penalty=penalty: task.loss(theta) + (penalty() if penalty else 0))
        state = {"t": state.get("t", 0) + task.n * task.a}
    return theta.detach()


def one_bowl_for_each(tasks):
    """As the first EWC: each earlier task keeps its own anchor."""
    theta, bowls = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), []
    for task in tasks:
        minimise(theta, lambda task=task: task.loss(theta) + sum(bowl() for bowl in bowls) / task.n)
        bowls.append(Penalty({"t": theta}, {"t": task.n * task.a}, 1.0))
    return theta.detach()


@pytest.mark.parametrize("count", [2, 3])
def test_on_quadratics_kappa_one_is_joint_training(count):
    assert torch.allclose(learned_in_turn(TASKS[:count]), joint(TASKS[:count]), atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        one_bowl_for_each,  # counts the first task twice
        lambda tasks: learned_in_turn(tasks, tokens=lambda task: 1),  # the new loss is a mean, the old Fisher still a sum
        lambda tasks: learned_in_turn(tasks, kappa=2.0),
    ],
)
def test_the_wrong_variants_are_not(wrong):
    assert not torch.allclose(wrong(TASKS), joint(TASKS), atol=0.05)


@pytest.fixture
def factors():
    return {"a": torch.nn.Parameter(torch.tensor([[1.0, 2.0]])), "b": torch.nn.Parameter(torch.tensor([3.0]))}


FISHER = {"a": torch.tensor([[4.0, 0.0]]), "b": torch.tensor([6.0])}


def test_the_penalty_is_half_the_curvature_times_the_way_squared(factors):
    penalty = Penalty(factors, FISHER, 0.5)
    assert penalty() == 0
    penalty().backward()
    assert all(not p.grad.any() for p in factors.values())
    with torch.no_grad():
        factors["a"] += 2
        factors["b"] -= 1
    penalty().backward()
    assert penalty().item() == 0.5 / 2 * (4 * 2**2 + 6 * 1**2)
    assert factors["a"].grad.tolist() == [[0.5 * 4 * 2, 0.0]]
    assert factors["b"].grad.tolist() == [0.5 * 6 * -1]


@pytest.mark.parametrize(
    "fisher",
    [
        {"a": FISHER["a"]},
        {**FISHER, "c": FISHER["b"]},
        {**FISHER, "b": torch.ones(2)},
    ],
)
def test_a_fisher_of_other_factors_fails_the_job(factors, fisher):
    with pytest.raises(Inert, match="ewc_inert: the champion's Fisher is not of these factors"):
        Penalty(factors, fisher, 1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_fisher_that_says_nothing_fails_the_job(factors, value):
    with pytest.raises(Inert, match="zero everywhere"):
        Penalty(factors, {name: torch.full_like(f, value) for name, f in FISHER.items()}, 1.0)


def test_a_penalty_that_stays_zero_fails_the_job(factors):
    penalty = Penalty(factors, FISHER, 1.0)
    penalty.note(torch.tensor(1.0), penalty())
    with torch.no_grad():
        factors["a"][0, 1] += 5  # where the Fisher is zero
    with pytest.raises(Inert, match="exactly zero throughout"):
        penalty.outcome()
    with torch.no_grad():
        factors["b"] += 1e-3
    assert penalty.outcome()["penalty"] == pytest.approx(3e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("penalties", "said"),
    [
        ([10.1] * 3 + [9.9] * 7, "ewc_stiff: the penalty was over 10 times the loss in 30% of the batches"),
        ([10.1] * 2 + [9.9] * 8, None),
        ([0.0] * 9 + [0.011], None),
        ([0.0] * 9 + [0.009], "ewc_faint: the penalty was never over 1% of the loss"),
    ],
)
def test_a_penalty_that_leaves_no_room_or_changes_nothing_is_said(factors, penalties, said):
    penalty = Penalty(factors, FISHER, 1.0)
    for value in penalties:
        penalty.note(torch.tensor(1.0), torch.tensor(value))
    warning = penalty.outcome().get("warning")
    assert warning is None if said is None else warning.startswith(said)


def test_how_the_penalty_stood_to_the_loss_at_the_start_in_the_middle_and_at_the_end_is_kept(factors):
    penalty = Penalty(factors, FISHER, 1.0)
    for loss, value in ((4.0, 0.0), (2.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.0, 3e-12)):
        penalty.note(torch.tensor(loss), torch.tensor(value))
    course = penalty.outcome()["penalty_to_loss"]
    assert course == {"start": 0.0, "middle": 0.5, "end": pytest.approx(3)}


def test_without_a_batch_nothing_is_said_of_its_course(factors):
    penalty = Penalty(factors, FISHER, 1.0)
    with torch.no_grad():
        factors["b"] += 1
    assert penalty.outcome()["penalty_to_loss"] == {}


@pytest.fixture
def examples(tokenizer):
    rows = [("a" * (1 + 5 * n % 17), "yes" if n % 3 else "oh no") for n in range(8)]
    return [encode(tokenizer, [{"role": "user", "content": text}], reply, 64) for text, reply in rows]


def test_a_version_leaves_the_old_fisher_faded_and_the_new_one_in_sum(adapted, examples):
    parameters, settings = adapter.factors(adapted), {**SETTINGS, "ewc_gamma": 0.5}
    tokens = sum(e.reply_length for e in examples)
    new = fisher(adapted, parameters, examples, 1, seed=3)
    ewc = Ewc(Naive())
    first = ewc.consolidate(adapted, parameters, {}, examples, 1, settings)
    third = ewc.consolidate(
        adapted, parameters, ewc.consolidate(adapted, parameters, first, examples, 1, settings), examples, 1, settings
    )
    for name, f in new.items():
        assert torch.allclose(first[name], tokens * f, rtol=1e-4)
        assert torch.allclose(third[name], (1 + 0.5 + 0.25) * tokens * f, rtol=1e-4)
    nothing = ewc.consolidate(adapted, parameters, first, [], 1, settings)
    assert all(torch.equal(nothing[name], 0.5 * f) for name, f in first.items())
    some = ewc.consolidate(adapted, parameters, {}, examples, 1, {**settings, "ewc_sequences": 4})
    assert 0.2 < sum(float(f.sum()) for f in some.values()) / sum(float(f.sum()) for f in first.values()) < 5, (
        "still for all tokens"
    )


def test_without_a_fisher_or_a_weight_there_is_no_penalty(factors):
    ewc = Ewc(Naive())
    assert ewc.penalty(factors, {}, 10, SETTINGS) is None
    assert ewc.penalty(factors, FISHER, 10, {**SETTINGS, "ewc_kappa": 0.0}) is None
    assert ewc.penalty(factors, FISHER, 0, SETTINGS) is None, "the trainer says why there is nothing to learn"
    with torch.no_grad():
        penalty = ewc.penalty(factors, FISHER, 10, {**SETTINGS, "ewc_kappa": 3.0})
        factors["b"] += 1
    assert penalty().item() == pytest.approx(3.0 / 10 / 2 * 6)


SCALE, AWAY = 0.3, 0.05


def step_gradient(base_path, tokenizer, examples, folder, *, is_penalised, **changes):
    """What all batches of a job's one optimiser step brought to each factor, which stand away from their anchor."""
    model, _ = adapter.load_base(base_path, "float32")
    parameters = adapter.factors(adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0))
    penalty = Penalty(parameters, {name: torch.full_like(p, 2.0) for name, p in parameters.items()}, SCALE)
    brought = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data += AWAY
        p.register_hook(brought[name].add_)
    settings, own = {**SETTINGS, **changes}, Path(tempfile.mkdtemp(dir=folder))
    fit(model, tokenizer, examples, [], settings, "float32", own, lambda _: None, penalty if is_penalised else None)
    return brought


@pytest.fixture
def gradient(base, tokenizer, examples, tmp_path):
    def gradient(*, is_penalised=True, **changes):
        return step_gradient(base.path, tokenizer, examples, tmp_path, is_penalised=is_penalised, **changes)

    return gradient


def penalty_share(found, without):
    """How often the penalty's own gradient, κ/N F (θ − θ*), stands in a step's: 1 is right. Of all factors, at most and least."""
    shares = torch.cat([(found[name] - without[name]).flatten() for name in found]) / (SCALE * 2.0 * AWAY)
    return [float(shares.min()), float(shares.max())]


BATCHES = [{"batch_size": 8}, {"batch_size": 2, "accumulation": 4}, {"batch_size": 2, "accumulation": 8}]


@pytest.mark.parametrize("batches", BATCHES, ids=["one batch", "four batches", "four of at most eight"])
def test_the_penalty_stands_in_each_step_once(gradient, batches):
    without = gradient(is_penalised=False)
    assert penalty_share(gradient(**batches), without) == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize("batches", BATCHES[1:], ids=["four batches", "four of at most eight"])
def test_also_where_the_trainer_divides_the_loss(gradient, batches, monkeypatch):
    monkeypatch.setattr(trainer._Trainer, "_get_num_items_in_batch", lambda *_: None)
    assert penalty_share(gradient(**batches), gradient(is_penalised=False, **batches)) == pytest.approx([1, 1], abs=0.02)


def test_it_is_clipped_with_the_rest(gradient):
    """Added after clipping it would stand against a task's gradient of norm 1 at most, and pull far too hard."""
    stepped = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: stepped.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
    )
    brought = flat(gradient(max_grad_norm=0.5).values())
    hook.remove()
    assert brought.norm() > 1
    assert float(flat(stepped).norm()) == pytest.approx(0.5, rel=1e-3)
    assert float(flat(stepped).abs().sum()) == pytest.approx(0.5 * float(brought.abs().sum() / brought.norm()), rel=1e-3)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def wrong_loss(share):
    """The trainer's loss with `share(args)` of the penalty in each batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, mask, _ = token_losses(model, inputs)
        self._penalty.note(losses.sum(), self._penalty())
        return (losses * mask).sum() / num_items_in_batch + self._penalty() * share(self.args)

    return compute_loss


@pytest.mark.parametrize(
    ("share", "comes_to"),
    [(lambda args: 1, 4), (lambda args: 1 / args.gradient_accumulation_steps, 0.5)],
    ids=["whole in each batch", "divided by batches that never came"],
)
def test_the_wrong_shares_are_not(gradient, monkeypatch, share, comes_to):
    without = gradient(is_penalised=False)
    monkeypatch.setattr(trainer._Trainer, "compute_loss", wrong_loss(share))
    assert penalty_share(gradient(batch_size=2, accumulation=8), without) == pytest.approx([comes_to] * 2, abs=0.02)


def test_validation_asks_how_well_it_learns_not_how_far_it_went(base, tokenizer, examples, tmp_path):
    model, _ = adapter.load_base(base.path, "float32")
    parameters = adapter.factors(adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0))
    penalty = Penalty(parameters, {name: torch.ones_like(p) for name, p in parameters.items()}, SCALE)
    settings = {**SETTINGS, "batch_size": 2, "epochs": 2}
    fit(model, tokenizer, examples, examples[:3], settings, "float32", tmp_path / "job", lambda _: None, penalty)
    assert len(penalty._seen) == 8, "once in each of the training's batches"


def work(rank, base_path, tokenizer, examples, folder):
    """One worker of two, as Ray Train starts them."""
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for is_penalised in (True, False):
        changes = {"is_penalised": is_penalised, "batch_size": 2, "accumulation": 2}
        torch.save(step_gradient(base_path, tokenizer, examples, folder, **changes), folder / f"{rank}-{is_penalised}")
    torch.distributed.destroy_process_group()


def test_each_of_several_workers_brings_the_whole_penalty_and_they_are_averaged(base, tokenizer, examples, gradient, tmp_path):
    torch.multiprocessing.spawn(work, (base.path, tokenizer, examples, tmp_path), nprocs=2)

    def averaged(is_penalised):
        both = [torch.load(tmp_path / f"{rank}-{is_penalised}") for rank in range(2)]
        return {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}

    assert penalty_share(averaged(True), averaged(False)) == pytest.approx([1, 1], abs=0.02)
    assert penalty_share(averaged(True), gradient(is_penalised=False)) == pytest.approx([1, 1], abs=0.02)
