"""The divergence over 65 buckets against the full one by enumeration; what it must not be; what is kept against the model."""

from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learners import dark
from learners.dark import Distillation, buckets, divergence, joined, look, masses
from learners.encode import IGNORED, Encoded, collate, cross_entropies, reply_logits
from learners.ewc import Inert

VOCABULARY, TOKENS = 90, 7


@pytest.fixture
def old():
    return 2 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def new(old):
    return old + 0.5 * torch.randn(old.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def full(q, p):
    """KL of the logits q from the logits p, in nats a token."""
    return (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1)


def exact(q, p):
    """Divergence of q's buckets, in double precision throughout."""
    tokens, kept = buckets(q)
    known = kept.log_softmax(-1)
    return (known.exp() * (known - masses(p, tokens))).sum(-1)


def within_the_rest(q, p):
    """By the chain rule, what the buckets do not see: the rest's mass times the divergence within the rest."""
    tokens = q.topk(dark.TOP).indices
    rest = torch.ones_like(q, dtype=torch.bool).scatter(-1, tokens, value=False)
    within = full(q[rest].view(len(q), -1), p[rest].view(len(q), -1))
    return (q.softmax(-1) * rest).sum(-1) * within


def top_alone(q, p):
    """The well-known wrong one: the kept tokens' own terms, the rest forgotten."""
    tokens, kept = buckets(q)
    return (kept[:, :-1].exp() * (kept[:, :-1] - masses(p, tokens)[:, :-1])).sum(-1)


def top_made_whole(q, p):
    """The other one: both made to sum to one over the kept tokens."""
    tokens, _ = buckets(q)
    return full(q.gather(-1, tokens), p.gather(-1, tokens))


def is_the_full_one(estimate, q, p):
    return torch.allclose(estimate(q, p) + within_the_rest(q, p), full(q, p), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("away", [0.0, 5.0], ids=["near", "the rest has most of the mass"])
def test_with_what_is_within_the_rest_it_is_the_full_divergence(old, new, away):
    new = new.scatter(-1, old.topk(dark.TOP).indices, -away, reduce="add")
    assert is_the_full_one(exact, old, new)
    assert not is_the_full_one(top_alone, old, new)
    assert not is_the_full_one(top_made_whole, old, new)


def test_more_buckets_see_more_until_all_is_seen(old, new, monkeypatch):
    found = []
    for top in (1, 4, 16, 64, VOCABULARY - 1, VOCABULARY + 10):
        monkeypatch.setattr(dark, "TOP", top)
        found.append(exact(old, new))
    assert all((more >= less - 1e-12).all() for less, more in pairwise(found))
    assert torch.allclose(found[-1], full(old, new), atol=1e-12)


def test_where_the_model_is_what_it_was_nothing_pulls(old):
    at = old.clone().requires_grad_()
    exact(old, at).sum().backward()
    assert at.grad.abs().max() < 1e-15
    wrong = old.clone().requires_grad_()
    top_alone(old, wrong).sum().backward()
    assert wrong.grad.abs().max() > 1e-3


def test_its_gradient_is_the_bucket_s_mass_less_what_it_was(old, new):
    at = new.clone().requires_grad_()
    exact(old, at).sum().backward()
    q, p, tokens = old.softmax(-1), new.softmax(-1), old.topk(dark.TOP).indices
    is_top = torch.zeros_like(q, dtype=torch.bool).scatter(-1, tokens, value=True)
    rest = [(mass * ~is_top).sum(-1, keepdim=True) for mass in (q, p)]
    assert torch.allclose(at.grad, torch.where(is_top, p - q, p * (1 - rest[0] / rest[1])), atol=1e-12)


def test_logits_are_known_up_to_a_constant(old, new):
    assert torch.allclose(exact(old, new + 3), exact(old, new), atol=1e-12)
    assert not torch.allclose((old - (new + 3)).square().mean(), (old - new).square().mean(), rtol=0.5), "as squares do"


def test_half_precision_keeps_a_hundredth_of_a_nat(old):
    tokens, kept = buckets(old.float())
    assert (kept.half().float() - kept).abs().max() < 1e-2
    assert divergence(old.float(), tokens, kept.half()).abs().max() < 1e-4


def test_the_rest_of_a_sure_model_is_not_lost_in_rounding():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3] = 40.0
    tokens, kept = buckets(logits)
    assert kept[0, -1].item() == pytest.approx(torch.tensor(VOCABULARY - dark.TOP).log().item() - 40, abs=1e-5)
    assert 1 - kept[0, :-1].exp().sum() == 0, "one less the top's sum would be nothing"
    assert divergence(logits, tokens, kept.clamp(min=dark.LEAST)).isfinite().all()


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.7}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()


TEXTS = [
    Encoded([3, 4, 5, 2, 1], [IGNORED, IGNORED, 5, 2, 1], 1.0, 30),
    Encoded([2, 6, 1], [IGNORED, 6, 1], 1.0, 10),
    Encoded([5, 5, 4, 1], [IGNORED, IGNORED, IGNORED, 1], 1.0, 20),
]


def test_what_is_kept_is_what_the_model_gives_each_reply_token(model):
    """Of replies of unlike lengths, padded in one batch; in the keys' order."""
    kept = look(model.train(), TEXTS, 0)
    assert model.training
    assert kept[dark.KEYS].tolist() == [10, 20, 30]
    assert kept[dark.LENGTHS].tolist() == [2, 1, 3]
    model.eval()
    alone = torch.cat([reply_logits(model, collate([TEXTS[n]], 0))[0][0] for n in (1, 2, 0)]).log_softmax(-1).detach()
    assert torch.allclose(kept[dark.LOGS][:, :-1].float(), alone.gather(-1, kept[dark.TOKENS].long()), atol=1e-2)
    assert torch.allclose(kept[dark.LOGS].float().exp().sum(-1), torch.ones(6), atol=1e-2)


def test_what_is_no_longer_kept_is_gone(model):
    kept = look(model, TEXTS[:2], 0)
    assert joined(kept, look(model, TEXTS[2:], 0), {10, 20})[dark.KEYS].tolist() == [10, 20]
    assert joined(kept, {}, None).keys() == kept.keys()
    assert all(torch.equal(joined(kept, {}, None)[name], tensor) for name, tensor in kept.items())
    assert joined(kept, {}, set()) == {}


def test_of_a_remembered_token_the_loss_is_beta_times_the_label_s_and_alpha_times_the_divergence(model):
    kept = look(model, TEXTS[:2], 0)
    with torch.no_grad():
        model.lm_head.weight += 0.2 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    batch = collate(TEXTS, 0)
    logits, wanted = reply_logits(model, batch)
    plain = cross_entropies(logits, wanted)
    distillation = Distillation(kept, TEXTS[:2], 0.7, 0.3)
    mixed = distillation(plain, logits, batch["keys"])
    total = 0.0
    tokens, logs = (torch.split(kept[name], [2, 3]) for name in (dark.TOKENS, dark.LOGS))
    for row, place, length in ((0, 1, 3), (1, 0, 2)):
        apart = divergence(logits[row, -length:], tokens[place].long(), logs[place])
        assert torch.allclose(mixed[row, -length:], 0.3 * plain[row, -length:] + 0.7 * apart)
        assert apart.min() > 1e-3
        total += apart.sum().item()
    assert torch.equal(mixed[2], plain[2]), "nothing is known of it"
    assert distillation.outcome() == {"distilled_examples": 2, "divergence": pytest.approx(total / 5)}


def test_what_no_longer_fits_is_rehearsed_as_it_is(model):
    """A reply that has become shorter is not compared token by token with what was another's."""
    kept = look(model, TEXTS[:2], 0)
    shorter = Encoded([2, 1], [IGNORED, 1], 1.0, 10)
    assert Distillation(kept, [shorter, TEXTS[0]], 0.5, 0.5).outcome()["distilled_examples"] == 1


def test_where_nothing_fits_any_more_the_job_fails_before_it_trains(model):
    kept = look(model, TEXTS[:2], 0)
    shorter = Encoded([2, 1], [IGNORED, 1], 1.0, 10)
    with pytest.raises(Inert, match="der_inert"):
        Distillation(kept, [shorter, TEXTS[2]], 0.5, 0.5)
    assert "warning" not in Distillation(kept, [shorter], 0.0, 0.5).outcome(), "a term without weight need not be alive"


def test_where_none_of_what_is_rehearsed_was_known_it_is_said(model):
    """So it is after a change of strategy, so it does not fail; that the weight holds nothing must be seen."""
    kept = look(model, TEXTS[:2], 0)
    told = Distillation(kept, [TEXTS[2]], 0.5, 0.5).outcome()
    assert told["distilled_examples"] == 0
    assert told["warning"].startswith("der_faint: the champion left nothing of the 1 remembered examples")
    assert "warning" not in Distillation(kept, [TEXTS[2]], 0.0, 0.5).outcome()


def test_a_divergence_that_stays_zero_fails_the_job(model):
    distillation = Distillation(look(model, TEXTS, 0), TEXTS, 0.5, 0.5)
    distillation._seen = [torch.tensor(0.0)] * 3
    with pytest.raises(Inert, match="der_inert"):
        distillation.outcome()
