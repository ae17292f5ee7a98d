from dataclasses import replace

import pytest
import torch

from learners import adapter, trainer
from learners.encode import encode, token_losses
from learners.evaluate import score
from learners.trainer import WHOLE, Lifeless, fit, last_whole

SETTINGS = {
    "learning_rate": 0.02,
    "epochs": 2,
    "batch_size": 4,
    "accumulation": 1,
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "early_stopping_patience": 0,
    "seed": 3,
}


class Killed(BaseException):
    pass


@pytest.fixture
def examples(tokenizer):
    rows = [("a" * (1 + 5 * n % 17), "yes" if n % 3 else "oh no") for n in range(16)]
    return [encode(tokenizer, [{"role": "user", "content": text}], reply, 64) for text, reply in rows]


@pytest.fixture
def learn(base, tokenizer, examples, tmp_path):
    def learn(folder="checkpoints", report=lambda _: None, validation=(), **changes):
        model, _ = adapter.load_base(base.path, "float32")
        adapted = adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0)
        fit(adapted, tokenizer, examples, validation, {**SETTINGS, **changes}, "float32", tmp_path / folder, report)
        return adapted

    return learn


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_it_learns_and_says_how_far_it_is(learn, examples):
    told = []
    model = learn(report=told.append, epochs=10)
    with adapter.without(model):
        before = score(model, examples, 1)
    after = score(model, examples, 1)
    assert sum(after.loglik) / 16 > sum(before.loglik) / 16 + 1
    assert [t["step"] for t in told] == list(range(1, 41))
    assert told[-1]["steps"] == 40
    assert told[-1]["eta_seconds"] == 0
    assert told[-1]["tokens_per_second"] > 0
    assert told[-1]["loss"] < told[0]["loss"]


def course(learn, folder, **changes):
    """The losses of a job's steps: weights would not do, since AdamW makes whole steps of gradients that are all rounding."""
    losses = []
    learn(folder, report=lambda told: losses.append(told["loss"]), **changes)
    return losses


def mean_of_means(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """The well-known wrong loss: each batch's own mean, shared over the accumulated ones, whatever its tokens."""
    losses, mask, _ = token_losses(model, inputs)
    loss = losses.sum() / mask.sum() / self.args.gradient_accumulation_steps
    return (loss, {}) if return_outputs else loss


def test_accumulation_changes_nothing_but_the_batches(learn, monkeypatch):
    whole = course(learn, "whole", batch_size=8)
    assert course(learn, "parts", batch_size=2, accumulation=4) == pytest.approx(whole, rel=1e-3)
    monkeypatch.setattr(trainer._Trainer, "compute_loss", mean_of_means)
    assert course(learn, "means", batch_size=2, accumulation=4) != pytest.approx(whole, rel=1e-2)


def without_weights(self, model, inputs, num_items_in_batch):
    """The wrong loss of a collator whose weights nobody reads."""
    losses, mask, _ = token_losses(model, inputs)
    return losses.sum() / mask.sum()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (without_weights, "do not reach the gradient"),
        (lambda self, model, inputs, _: 0 * without_weights(self, model, inputs, _), "do not reach the gradient"),
        (lambda self, model, inputs, _: 0 * token_losses(model, inputs)[0].sum() * inputs["weights"].sum(), "not reach"),
    ],
)
def test_a_loss_that_the_weights_do_not_reach_ends_the_job(learn, monkeypatch, wrong, told):
    monkeypatch.setattr(trainer._Trainer, "_weighted", wrong)
    with pytest.raises(Lifeless, match=told):
        learn()


def test_a_job_that_dies_goes_on_from_its_checkpoint_to_the_same_end(learn, tmp_path):
    steps = []

    def die(told):
        steps.append(told["step"])
        if told["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        learn(report=die)
    torn = tmp_path / "checkpoints" / "checkpoint-6"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    again = learn(report=lambda told: steps.append(told["step"]))
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert torch.allclose(weights(again), weights(learn("other")), atol=1e-5)


def test_a_torn_checkpoint_is_none(tmp_path):
    for step, is_whole in ((8, True), (12, True), (16, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if is_whole:
            (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-12")
    assert last_whole(tmp_path / "nowhere") is None


def test_it_stops_when_validation_gets_no_better_and_keeps_the_best(learn, tokenizer):
    contrary = [encode(tokenizer, [{"role": "user", "content": "a" * n}], "zz?", 64) for n in (1, 6, 11)]
    steps = []
    model = learn(report=lambda told: steps.append(told["step"]), validation=contrary, early_stopping_patience=2, epochs=20)
    assert len(steps) < 80
    last = learn("last", epochs=len(steps) / 4)
    assert sum(score(model, contrary, 1).loglik) > sum(score(last, contrary, 1).loglik)


def test_progressive_mixing_makes_an_epoch_as_long_as_its_fresh_examples_take(learn, examples):
    examples[:] = [replace(e, source="fresh" if n < 12 else "remembered") for n, e in enumerate(examples)]
    told = []
    learn(report=told.append, progressive_mixing=[0.25, 0.75])
    assert told[-1]["step"] == told[-1]["steps"] == 2 * 24 / 4, "12 fresh ones at a half on average"


def test_activations_that_are_computed_again_give_the_same_gradients(learn):
    losses = {}
    for asked in ("on", "off"):
        losses[asked] = []
        model = learn(
            asked, gradient_checkpointing=asked, epochs=1, report=lambda told, asked=asked: losses[asked].append(told["loss"])
        )
        assert model.is_gradient_checkpointing == (asked == "on")
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)


def test_the_rate_falls_as_asked(learn):
    rest = {"epochs": 2, "warmup_ratio": 0.0}
    assert course(learn, "constant", lr_scheduler="constant_with_warmup", **rest) != course(learn, "cosine", **rest)


def test_nothing_to_train_on_is_said(base, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(None, tokenizer, [], [], SETTINGS, "float32", tmp_path, lambda _: None)
