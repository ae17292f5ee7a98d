"""The Fisher's recursion over versions, its estimator in a model of grouped heads, and whether its penalty is selective."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learners import adapter
from learners.ewc import Ewc, Penalty
from learners.fisher import fisher
from learners.naive import Naive
from tests.learners.test_fisher import PAD, TEXTS, empirical, enumerated, flat, one, relative, softmax

__all__ = ["softmax"]

GAMMA, VERSIONS = 0.5, 5
SETTINGS = {"seed": 3, "ewc_gamma": GAMMA, "ewc_sequences": 512}


def faded(counts, found):
    """Σ γ^(5−i) n_i F̂_i, what the recursion comes to."""
    return sum(GAMMA ** (VERSIONS - 1 - i) * n * f for i, (n, f) in enumerate(zip(counts, found, strict=True)))


def without_counts(counts, found):
    """A version of two examples weighs as much as one of two hundred."""
    return faded([1] * len(counts), found)


def moving_average(counts, found):
    """EWC++'s: old and new share one weight, so that the whole never grows."""
    total = 0.0
    for n, f in zip(counts, found, strict=True):
        total = GAMMA * total + (1 - GAMMA) * n * f
    return total


def faded_at_once(counts, found):
    """γ over the new Fisher too."""
    return GAMMA * faded(counts, found)


def test_t3_after_five_versions_it_is_the_sum_of_all_faded_by_their_age(softmax):
    """T3. Each version has weights and examples of its own, and not as many; the wrong recursions come to something else."""
    parameters, state, counts, found = {"w": softmax.weight}, {}, [], []
    for version in range(VERSIONS):
        softmax.weight.data += 0.3 * version
        fresh = [one(n % 5, n % 3) for n in range(8 + 40 * version)]
        state = Ewc(Naive()).consolidate(softmax, parameters, state, fresh, PAD, SETTINGS)
        counts.append(sum(e.reply_length for e in fresh))
        in_its_order = random.Random(SETTINGS["seed"]).sample(fresh, len(fresh))
        found.append(fisher(softmax, parameters, in_its_order, PAD, SETTINGS["seed"])["w"])
    scale = state["w"].abs().max()
    assert torch.allclose(state["w"], faded(counts, found), atol=1e-5 * float(scale))
    for wrong in (without_counts, moving_average, faded_at_once):
        assert not torch.allclose(state["w"], wrong(counts, found), atol=0.1 * float(scale))


def grouped():
    """Two query heads that share one head of keys and values, as grouped-query attention has them, with an adapter on all."""
    torch.manual_seed(0)
    shape = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.7, "num_key_value_heads": 1}
    model = adapter.attach(LlamaForCausalLM(LlamaConfig(**shape, **tokens)), None, rank=2, alpha=4, dropout=0.5, seed=0)
    for parameter in adapter.factors(model).values():
        parameter.data.normal_(std=0.5)
    return model


def test_t8_of_shared_keys_and_values_it_is_without_bias_at_any_batch_size():
    """T8 asks for per-sample gradients by hooks, or for an estimator that needs none: ours is the second kind.

    So what is shown is that the square of a whole batch's summed gradient is, on average, the exact Fisher by enumeration.
    The same square of the data's own labels is not, nor that of the batch's mean gradient.
    """
    model = grouped()
    parameters = {n: p for n, p in adapter.factors(model).items() if ".k_proj." in n or ".v_proj." in n}
    assert {p.shape[0] for n, p in parameters.items() if "lora_B" in n} == {4}, "half as wide as the queries"
    exact = flat(enumerated(model, parameters, TEXTS))
    batched = torch.stack([flat(fisher(model, parameters, TEXTS, PAD, seed, batch_size=3)) for seed in range(400)]).mean(0)
    assert relative(batched, exact) < 0.2
    assert float(batched.sum() / exact.sum()) == pytest.approx(1, abs=0.1)
    assert relative(flat(empirical(model, parameters, TEXTS, 1)), exact) > 0.4
    assert relative(batched / len(TEXTS) ** 2, exact) > 0.8


class Lessons:
    """Two lessons with quadratic losses ½ (θ − t)ᵀ H (θ − t); the line has learned the first one and stands at its optimum."""

    STEPS, RATE = 100, 0.2

    def __init__(self, first, second, wanted):
        self.first, self.second = torch.diag(torch.tensor(first)), torch.tensor(second)
        self.anchor, self.wanted = torch.zeros(len(first)), torch.tensor(wanted)

    def learn(self, rate, kappa=0.0):
        """What is forgotten of the first lesson, and gained on the second."""
        theta = torch.nn.Parameter(self.anchor.clone())
        penalty = Penalty({"t": theta}, {"t": self.first.diagonal()}, kappa) if kappa else None
        optimizer = torch.optim.SGD([theta], lr=rate)
        for _ in range(self.STEPS):
            optimizer.zero_grad()
            loss = self.loss(self.second, theta, self.wanted) + (penalty() if penalty else 0)
            loss.backward()
            optimizer.step()
        end = theta.detach()
        before = self.loss(self.second, self.anchor, self.wanted)
        gained = before - self.loss(self.second, end, self.wanted)
        return float(self.loss(self.first, end, self.anchor)), float(gained)

    def naive(self, gain):
        """What the naive run forgets whose learning rate gives it the same gain."""
        low, high = 0.0, self.RATE
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if self.learn(middle)[1] < gain else (low, middle)
        forgotten, gained = self.learn(high)
        assert gained == pytest.approx(gain, rel=1e-2)
        return forgotten

    @staticmethod
    def loss(curvature, theta, optimum):
        return (theta - optimum) @ curvature @ (theta - optimum) / 2


PARTLY = Lessons(
    first=[3.0, 2.0, 0.0, 0.0],
    second=[[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.5, 1.0, 0.3], [0.0, 0.0, 0.3, 1.0]],
    wanted=[0.0, 1.0, 1.0, 1.0],
)
SHARED = Lessons(first=[1.0] * 4, second=torch.eye(4).tolist(), wanted=[1.0, -1.0, 2.0, 0.5])


@pytest.mark.parametrize(("lessons", "least", "most"), [(PARTLY, 0.0, 0.7), (SHARED, 0.95, 1.05)], ids=["partly", "fully"])
def test_t17_for_the_same_gain_it_forgets_less_than_a_smaller_learning_rate_does_where_features_differ(lessons, least, most):
    """T17. Where both lessons share all features, holding back is all there is: it forgets as much as learning less does."""
    forgotten, gained = lessons.learn(lessons.RATE, kappa=1.0)
    assert gained > 0
    assert least <= forgotten / lessons.naive(gained) <= most
