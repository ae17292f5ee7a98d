"""The estimator against closed forms and enumeration; the variants known to be wrong must fail the same assertions."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from learners import adapter
from learners.encode import IGNORED, Encoded, collate, reply_logits, token_losses
from learners.fisher import fisher

PAD = 0


class Softmax(torch.nn.Module):
    """Softmax regression as a language model: the last token's features times a matrix are the next one's logits."""

    def __init__(self, features, weight):
        super().__init__()
        self.features, self.weight = features, torch.nn.Parameter(weight)
        self.device = weight.device

    def forward(self, input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=self.features[input_ids[:, logits_to_keep]] @ self.weight.T)


def one(prompt, label, weight=1.0):
    return Encoded([prompt, label], [IGNORED, label], weight)


def batch_mean_squared(model, parameters, examples, batch_size):
    """As in Avalanche, EWC-LoRA and others: the square of the mean gradient of a batch, with the data's labels."""
    return _squares(model, parameters, examples, batch_size, draw=False)


def sampled_without_batch(model, parameters, examples, batch_size):
    """Labels as they should be, but the factor B is forgotten."""
    return _squares(model, parameters, examples, batch_size, draw=True)


def empirical(model, parameters, examples, batch_size):
    """One example at a time, but with the data's labels."""
    return _squares(model, parameters, examples, 1, draw=False)


def _squares(model, parameters, examples, batch_size, *, draw):
    torch.manual_seed(0)
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    starts = range(0, len(examples), batch_size)
    for start in starts:
        logits, wanted = (part.flatten(0, 1) for part in reply_logits(model, collate(examples[start : start + batch_size], PAD)))
        loss = cross_entropy(logits, torch.distributions.Categorical(logits=logits).sample() if draw else wanted)
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            found[name] += gradient**2 / len(starts)
    return found


def relative(found, wanted):
    return float((found - wanted).abs().sum() / wanted.abs().sum())


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.fixture
def softmax():
    random = torch.Generator().manual_seed(1)
    return Softmax(torch.randn(5, 3, generator=random), torch.randn(5, 3, generator=random))


@pytest.fixture
def asked():
    """Each of the five prompts as often, with each of the five labels as often: not what the model would say."""
    return [one(n % 5, (n // 5) % 5) for n in range(4095)]


def analytic(model):
    """E over x of p (1 - p) x²: (classes, features)."""
    p = (model.features @ model.weight.T).softmax(-1).detach()
    return torch.einsum("nc,nj->cj", p * (1 - p), model.features**2) / len(p)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_it_is_the_closed_form_of_softmax_regression_at_any_batch_size(softmax, asked, batch_size):
    found = fisher(softmax, {"w": softmax.weight}, asked, PAD, seed=0, batch_size=batch_size)["w"]
    assert relative(found, analytic(softmax)) < 0.12


@pytest.mark.parametrize("wrong", [batch_mean_squared, sampled_without_batch, empirical])
def test_the_wrong_variants_are_not(softmax, asked, wrong):
    found = wrong(softmax, {"w": softmax.weight}, asked, 16)["w"]
    assert relative(found, analytic(softmax)) > 0.5


def test_without_the_batch_s_size_it_is_too_small_by_that_factor(softmax, asked):
    whole = fisher(softmax, {"w": softmax.weight}, asked, PAD, seed=0, batch_size=16)["w"].sum()
    wrong = sampled_without_batch(softmax, {"w": softmax.weight}, asked, 16)["w"].sum()
    assert 16 * float(wrong / whole) == pytest.approx(1, abs=0.2)


def test_where_the_data_is_the_model_s_the_empirical_one_is_right_too(softmax):
    torch.manual_seed(0)
    p = (softmax.features @ softmax.weight.T).softmax(-1)
    drawn = [one(n % 5, int(torch.multinomial(p[n % 5], 1))) for n in range(4095)]
    assert relative(empirical(softmax, {"w": softmax.weight}, drawn, 1)["w"], analytic(softmax)) < 0.12


def test_an_example_counts_by_its_weight(softmax):
    heavy = fisher(softmax, {"w": softmax.weight}, [one(2, 1, 9.0)], PAD, seed=5)["w"]
    light = fisher(softmax, {"w": softmax.weight}, [one(2, 1, 1.0)], PAD, seed=5)["w"]
    assert torch.allclose(heavy, 9 * light)


@pytest.fixture
def tiny():
    """A language model of seven tokens with an adapter on it, B not zero: all labels can be enumerated."""
    torch.manual_seed(0)
    shape = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.7}
    model = adapter.attach(LlamaForCausalLM(LlamaConfig(**shape, **tokens)), None, rank=2, alpha=4, dropout=0.5, seed=0)
    with torch.no_grad():
        for parameter in adapter.factors(model).values():
            parameter.normal_(std=0.3)
    return model


TEXTS = [
    Encoded([3, 4, 5, 2, 1], [IGNORED, IGNORED, 5, 2, 1]),
    Encoded([2, 6, 1], [IGNORED, 6, 1]),
    Encoded([5, 5, 4, 1], [IGNORED, IGNORED, IGNORED, 1]),
]


def enumerated(model, parameters, examples):
    """Σ over reply tokens and labels of p (∂ log p)², for each reply token: exact, without any sampling."""
    model.eval()
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example in examples:
        logits, _ = reply_logits(model, collate([example], PAD))
        for row in logits[0].log_softmax(-1):
            for log in row:
                gradients = torch.autograd.grad(log, list(parameters.values()), retain_graph=True)
                for total, gradient in zip(found.values(), gradients, strict=True):
                    total.add_(log.detach().exp() * gradient**2)
    return {name: total / sum(e.reply_length for e in examples) for name, total in found.items()}


def test_it_is_the_enumeration_of_all_labels_of_a_language_model(tiny):
    """Of replies of unlike lengths, padded in one batch."""
    parameters = adapter.factors(tiny)
    exact = flat(enumerated(tiny, parameters, TEXTS))
    draws = [flat(fisher(tiny, parameters, TEXTS, PAD, seed, batch_size=3)) for seed in range(1500)]
    assert relative(torch.stack(draws).mean(0), exact) < 0.12
    assert relative(flat(empirical(tiny, parameters, TEXTS, 1)), exact) > 0.5


def test_a_fresh_adapter_has_no_fisher_in_a(adapted):
    found = fisher(adapted, adapter.factors(adapted), TEXTS, PAD, seed=0)
    assert all((not value.any()) == ("lora_A" in name) for name, value in found.items())


def test_the_model_is_left_as_it_was(tiny):
    tiny.train()
    parameters = adapter.factors(tiny)
    before = [p.detach().clone() for p in parameters.values()]
    fisher(tiny, parameters, TEXTS, PAD, seed=0)
    assert tiny.training
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(parameters.values(), before, strict=True))


def test_reply_logits_are_what_the_loss_is_made_of(tiny):
    batch = collate(TEXTS, PAD)
    tiny.eval()
    logits, wanted = reply_logits(tiny, batch)
    losses, mask, _ = token_losses(tiny, batch)
    by_hand = -logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(losses[mask], by_hand[mask])
