"""The layer and the attention that jobs compute with, against what they stand for."""

from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import Linear
from torch.autograd.gradcheck import GradcheckError
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from learners import adapter, fused

SHAPE = {"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0}
IDS = torch.tensor([[5, 9, 11, 30, 7, 2]])


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def layer(dtype=torch.float64, *, bias=False):
    """x, W, bias, A, B."""
    some = random(7, dtype=dtype) if bias else None
    return random(2, 3, 5, dtype=dtype), random(7, 5, dtype=dtype), some, random(2, 5, dtype=dtype), random(7, 2, dtype=dtype)


def plain(x, weight, bias, a, b, scale):
    return linear(x, weight, bias) + scale * ((x @ a.T) @ b.T)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_formula_and_its_gradients_those_of_finite_differences(bias):
    x, weight, some, a, b = layer(bias=bias)
    assert torch.allclose(fused.adapted(x, weight, some, a, b, 1.5), plain(x, weight, some, a, b, 1.5))
    learned = [part.requires_grad_() for part in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: fused.adapted(x, weight, some, a, b, 1.5), learned)


def test_finite_differences_see_a_forgotten_scale():
    x, weight, _, a, b = layer()

    def unscaled(a):
        """Right in its value; its gradient by A lacks the scale."""
        right = fused.adapted(x, weight, None, a.detach(), b, 1.5)
        by_a = fused.adapted(x, weight, None, a, b, 1.0)
        return right + by_a - by_a.detach()

    assert torch.allclose(unscaled(a), fused.adapted(x, weight, None, a, b, 1.5))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(unscaled, [a.requires_grad_()])


def gradients(function, parts, *, is_autocast):
    """Of the sum of squares by x, A, B; all in fp64."""
    x, weight, bias, a, b = (None if part is None else part.clone() for part in parts)
    learned = [part.requires_grad_() for part in (x, a, b)]
    with torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext():
        made = function(x, weight, bias, a, b, 2.0)
    return [found.double() for found in torch.autograd.grad(made.double().square().sum(), learned)]


def test_under_autocast_it_is_no_further_from_the_truth_than_what_it_replaces():
    parts = random(64, 96, dtype=torch.bfloat16), random(48, 96, dtype=torch.bfloat16), None, random(4, 96), random(48, 4)
    parts = *parts[:3], parts[3].float(), parts[4].float()
    truth = gradients(plain, [part if part is None else part.double() for part in parts], is_autocast=False)
    ours, theirs = (gradients(function, parts, is_autocast=True) for function in (fused.adapted, plain))
    for exact, our, their in zip(truth, ours, theirs, strict=True):
        assert (our - exact).norm() < 0.01 * exact.norm()
        assert (our - exact).norm() < 1.5 * (their - exact).norm()


def test_without_autocast_narrow_factors_round_no_more_than_the_result_does(model, another):
    """What scores and fingerprints are computed by: the base in bf16, the factors in fp32."""
    ours = adapter.attach(model.to(torch.bfloat16), None, **SHAPE)
    theirs = adapter.attach(another.to(torch.bfloat16), None, **SHAPE, is_fused=False)
    for adapted in (ours, theirs):
        with torch.no_grad():
            for factor in adapter.factors(adapted).values():
                factor.copy_(random(*factor.shape).float() * 0.1)
    pairs = [m for m in ours.modules() if isinstance(m, Linear)], [m for m in theirs.modules() if isinstance(m, Linear)]
    assert len(pairs[0]) == 14  # seven in each of two layers
    for our, their in zip(*pairs, strict=True):
        x, factors = random(3, our.in_features).to(torch.bfloat16), (our.lora_A["default"], our.lora_B["default"])
        truth = plain(x.double(), our.base_layer.weight.double(), None, *(f.weight.double() for f in factors), 2.0)
        assert (our(x).double() - truth).norm() < 1.2 * (their(x).double() - truth).norm()


@pytest.mark.parametrize("is_fused", [True, False])
def test_who_holds_a_part_of_each_layer_computes_as_peft_does(model, is_fused):
    adapted = adapter.attach(model, None, **SHAPE, is_fused=is_fused)
    kinds = {type(module) is Linear for module in adapted.modules() if isinstance(module, Linear)}
    assert kinds == {not is_fused}


def test_a_warm_start_is_fused_too(written, another):
    again = adapter.attach(another, written, **SHAPE)
    assert not [module for module in again.modules() if type(module) is Linear]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_more_than_one_plain_adapter_is_computed_by_peft(model, monkeypatch, dropout):
    calls = []
    monkeypatch.setattr(fused, "adapted", lambda x, *rest: calls.append(1) or plain(x, *rest))
    adapted = adapter.attach(model, None, **{**SHAPE, "dropout": dropout})
    adapted.eval()(IDS)
    assert len(calls) == 14
    calls.clear()
    adapted.train()(IDS)
    assert len(calls) == (0 if dropout else 14)
    calls.clear()
    with adapter.without(adapted.eval()):
        adapted(IDS)
    assert not calls


class Layer(torch.nn.Module):
    """What transformers hands to an attention function beside the tensors."""

    is_causal, num_key_value_groups = True, 2


def attended(function, dtype, mask, *, length=11):
    """The result of `function` and its gradients by query, key and value."""
    query, key, value = (random(2, heads, length, 8 + heads).to(dtype)[..., :8] for heads in (4, 2, 2))
    learned = [part.requires_grad_() for part in (query, key, value)]
    made, _ = function(Layer(), query, key, value, mask, scaling=0.3)
    return [made, *torch.autograd.grad(made.float().square().sum(), learned)]


def left_padded(length=11):
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    mask[1, ..., :3] = False  # the first rows of the second text see nothing at all
    return mask


@pytest.mark.parametrize("mask", [None, left_padded()], ids=["causal", "padded"])
def test_short_attention_in_bf16_is_attention(mask):
    seen = slice(None) if mask is None else (slice(None), slice(3, None))
    ours = attended(fused.attention, torch.bfloat16, mask)
    truth = attended(sdpa_attention_forward, torch.float32, mask)
    assert all(torch.isfinite(part).all() for part in ours)
    assert (ours[0].float()[seen] - truth[0][seen]).abs().max() < 0.02 * truth[0].abs().max()
    if mask is None:
        for our, exact in zip(ours[1:], truth[1:], strict=True):
            assert (our.float() - exact).norm() < 0.03 * exact.norm()


def test_a_mask_is_heeded():
    ours, all_seen = (attended(fused.attention, torch.bfloat16, mask)[0] for mask in (left_padded(), None))
    assert torch.equal(ours[0], all_seen[0])
    assert not torch.allclose(ours[1, 5:].float(), all_seen[1, 5:].float(), atol=0.05)


@pytest.mark.parametrize(
    ("dtype", "length", "mask"),
    [(torch.float32, 11, None), (torch.bfloat16, fused.LONGEST + 1, None), (torch.bfloat16, 11, torch.zeros(1, 1, 11, 11))],
    ids=["fp32", "long", "float mask"],
)
def test_all_other_attention_is_pytorchs_own(monkeypatch, dtype, length, mask):
    monkeypatch.setattr(fused, "LONGEST", min(fused.LONGEST, length if dtype == torch.float32 else 512))
    calls = []

    def theirs(*args, **kwargs):
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(fused, "sdpa_attention_forward", theirs)
    made = attended(fused.attention, dtype, None if mask is None else mask.to(dtype), length=length)[0]
    assert calls
    assert made.shape == (2, length, 4, 8)


def test_without_gradients_it_is_pytorchs_own(monkeypatch):
    monkeypatch.setattr(fused, "sdpa_attention_forward", lambda *_: ("theirs", None))
    parts = [random(2, 2, 5, 8).to(torch.bfloat16) for _ in range(3)]
    assert fused.attention(Layer(), *parts, None)[0] == "theirs"


def whole_gradient(base, precision, *, is_ours):
    model, _ = adapter.load_base(base.path, precision)
    assert model.config._attn_implementation == fused.ATTENTION
    if not is_ours:
        model.set_attn_implementation("sdpa")
    adapted = adapter.attach(model, None, **SHAPE, is_fused=is_ours)
    with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
        loss = adapted(IDS, labels=IDS).loss
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(adapter.factors(adapted).values()))])


def test_a_whole_base_learns_the_same_by_it(base):
    exact = whole_gradient(base, "float32", is_ours=False)
    assert torch.allclose(whole_gradient(base, "float32", is_ours=True), exact, atol=1e-6)
    ours, theirs = (whole_gradient(base, "bfloat16", is_ours=is_ours) for is_ours in (True, False))
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() < 0.3 * exact.norm()


def test_the_reference_is_what_pytorch_computes():
    """Lest the comparison above be with something else: one head, no mask, by hand."""
    query = random(1, 1, 3, 4)
    scores = (query @ query.transpose(-1, -2) * 0.5).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), float("-inf"))
    by_hand = scores.softmax(-1) @ query
    assert torch.allclose(scaled_dot_product_attention(query, query, query, is_causal=True, scale=0.5), by_hand)
