"""What a penalty is worth once an optimiser has had it, and how the factors' gradients hang together with the product's."""

import pytest
import torch

from learners.ewc import Penalty

CURVATURE, TARGET = torch.tensor([1.0, 1.0]), torch.tensor([3.0, -2.0])
"""A task's loss ½ Σ a (θ − t)²: at the optimum its own gradient is 2.5 long, over what clipping lets through."""
FISHER, STIFF, ANCHOR = torch.tensor([5.0, 0.1]), torch.tensor([5e5, 0.1]), torch.zeros(2)
STEPS, NOISE, TRIES = 600, 0.5, 8


def settled(fisher, *, is_clipped_with_the_rest=True, noise=NOISE, steps=STEPS):
    """Where AdamW with clipping comes to rest, from the anchor, in as many runs side by side as the Fisher (runs, 2) has rows.

    Each run is clipped by itself. Of noisy gradients the mean over the last half of the steps, else the last point.
    """
    random, theta = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.zeros_like(fisher))
    penalty = Penalty({"t": theta}, {"t": fisher}, 1.0)
    optimizer, passed = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.0), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        noises = noise * torch.randn(theta.shape, generator=random)
        loss = (CURVATURE * (theta - TARGET).square()).sum() / 2 + (noises * theta).sum()
        (loss + penalty() if is_clipped_with_the_rest else loss).backward()
        theta.grad *= (1 / theta.grad.norm(dim=1, keepdim=True)).clamp(max=1)
        if not is_clipped_with_the_rest:
            theta.grad += torch.autograd.grad(penalty(), theta)[0]
        optimizer.step()
        passed.append(theta.detach().clone())
    return torch.stack(passed[steps // 2 :]).mean(0) if noise else passed[-1]


def closed_form(fisher):
    return (CURVATURE * TARGET + fisher * ANCHOR) / (CURVATURE + fisher)


@pytest.mark.parametrize(("fisher", "within", "steps"), [(FISHER, 0.02, 1000), (STIFF, 0.03, 2500)], ids=["soft", "stiff"])
def test_t14_within_the_loss_it_ends_at_the_closed_form_and_added_after_clipping_it_does_not(fisher, within, steps):
    """A stiff bowl takes all that clipping lets through, so the rest is slow to arrive; it does arrive."""

    def error(**how):
        return (settled(fisher.repeat(TRIES, 1), **how).mean(0) - closed_form(fisher)).abs().max()

    assert error(steps=steps) < within
    assert error(is_clipped_with_the_rest=False) > 0.2


def test_t15_over_eleven_decades_of_kappa_it_ends_ever_nearer_to_the_anchor_and_where_the_closed_form_says():
    """From κ = 1e-2 to 1e8, AdamW, clipped; down to a distance of 1e-4, what its last steps leave, within 5 %."""
    kappas = 10.0 ** torch.arange(-2, 9)
    bowls = kappas[:, None] * FISHER
    found, wanted = settled(bowls, noise=0.0), closed_form(bowls)
    away, right = found.norm(dim=1), wanted.norm(dim=1)
    lost = (FISHER * found.square()).sum(1)
    assert found.isfinite().all()
    seen = right > 1e-4
    assert seen.sum() >= 7
    assert torch.allclose(away[seen], right[seen], rtol=0.05)
    assert (away[seen].diff() < 0).all()
    assert (lost[seen].diff() < 0).all()
    assert (away[~seen] < 2e-3).all()
    after = settled(bowls, noise=0.0, is_clipped_with_the_rest=False, steps=300).norm(dim=1)
    assert not torch.allclose(after[seen], right[seen], rtol=0.05), "as it is where it is added after clipping"


def grows_from_nothing(make):
    """Whether a penalty and its gradient are zero where it is made, and it never falls on the way out along any ray."""
    random = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(3, 4, generator=random))
    penalty, start = make({"p": p}, {"p": torch.rand(3, 4, generator=random)}), p.detach().clone()
    value = penalty()
    is_at_rest = value == 0 and not torch.autograd.grad(value, p)[0].any()
    for _ in range(20):
        way, values = torch.randn(3, 4, generator=random), []
        for length in (0.0, 0.01, 0.1, 1.0, 10.0):
            p.data = start + length * way
            values.append(penalty().item())
        if values != sorted(values):
            return False
    return is_at_rest


def pulled_to_zero(factors, fisher):
    """The well-known wrong anchor: zero, whatever the champion's factors are, as for an adapter that begins at nothing."""
    return lambda: sum((fisher[name] * p.square()).sum() for name, p in factors.items())


def to_the_first_power(factors, fisher):
    """Linear in the way: its gradient is no smaller at the anchor than anywhere else."""
    then = {name: p.detach().clone() for name, p in factors.items()}
    return lambda: sum((fisher[name] * (p - then[name])).sum() for name, p in factors.items())


def test_t12_at_the_anchor_it_and_its_gradient_are_nothing_and_it_grows_along_every_way_from_there():
    assert grows_from_nothing(lambda factors, fisher: Penalty(factors, fisher, 0.3))
    assert not grows_from_nothing(pulled_to_zero)
    assert not grows_from_nothing(to_the_first_power)


def test_the_factors_gradients_are_the_products_through_the_other_factor(adapted):
    """∂L/∂A = s Bᵀ G and ∂L/∂B = s G Aᵀ, G being the gradient of the dense weight: without s they are not."""
    torch.manual_seed(0)
    adapted.double()
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    a, b, dense = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    b.data.normal_()
    dense.requires_grad_()
    adapted(input_ids=torch.arange(2, 30)[None]).logits.square().mean().backward()
    s = layer.scaling["default"]
    assert s == 2
    assert torch.allclose(a.grad, s * b.T @ dense.grad, rtol=1e-6, atol=1e-12)
    assert torch.allclose(b.grad, s * dense.grad @ a.T, rtol=1e-6, atol=1e-12)
    assert not torch.allclose(a.grad, b.T @ dense.grad, rtol=1e-2)


@pytest.mark.parametrize("turn", [2.0, -1.0])
def test_the_diagonal_does_not_see_that_other_factors_are_the_same_function(turn):
    """What decision 11 accepts: a move that changes no reply is paid for as if it did."""
    random = torch.Generator().manual_seed(2)
    a, b = (torch.nn.Parameter(torch.randn(*shape, generator=random)) for shape in ((2, 5), (4, 2)))
    product = (b @ a).detach()
    penalty = Penalty({"a": a, "b": b}, {"a": torch.ones(2, 5), "b": torch.ones(4, 2)}, 1.0)
    a.data, b.data = a.data * turn, b.data / turn
    assert torch.allclose(b @ a, product, atol=1e-6)
    assert penalty().item() > 1
