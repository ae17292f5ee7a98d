"""What a penalty is worth once an optimiser has had it, and how the factors' gradients hang together with the product's."""

import pytest
import torch

from learners.ewc import Penalty

CURVATURE, TARGET = torch.tensor([1.0, 1.0]), torch.tensor([3.0, -2.0])
"""A task's loss ½ Σ a (θ − t)²: at the optimum its own gradient is 2.5 long, over what clipping lets through."""
FISHER, ANCHOR = torch.tensor([5.0, 0.1]), torch.zeros(2)
STEPS, NOISE = 1500, 0.5


def settled(*, is_clipped_with_the_rest):
    """Where AdamW with clipping and noisy gradients comes to rest: the mean of the last half of its steps."""
    random, theta = torch.Generator().manual_seed(0), torch.nn.Parameter(ANCHOR.clone())
    penalty = Penalty({"t": theta}, {"t": FISHER}, 1.0)
    optimizer, passed = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.0), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
        optimizer.zero_grad()
        noise = NOISE * torch.randn(2, generator=random)
        loss = (CURVATURE * (theta - TARGET).square()).sum() / 2 + (noise * theta).sum()
        (loss + penalty() if is_clipped_with_the_rest else loss).backward()
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        if not is_clipped_with_the_rest:
            theta.grad += torch.autograd.grad(penalty(), theta)[0]
        optimizer.step()
        passed.append(theta.detach().clone())
    return torch.stack(passed[STEPS // 2 :]).mean(0)


def test_within_the_loss_it_ends_at_the_closed_form_and_added_after_clipping_it_does_not():
    wanted = (CURVATURE * TARGET + FISHER * ANCHOR) / (CURVATURE + FISHER)
    assert (settled(is_clipped_with_the_rest=True) - wanted).abs().max() < 0.02
    assert (settled(is_clipped_with_the_rest=False) - wanted).abs().max() > 0.2


def test_it_grows_along_every_way_from_the_anchor():
    random = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(3, 4, generator=random))
    penalty, start = Penalty({"p": p}, {"p": torch.rand(3, 4, generator=random)}, 0.3), p.detach().clone()
    for _ in range(20):
        way, values = torch.randn(3, 4, generator=random), []
        for length in (0.0, 0.01, 0.1, 1.0, 10.0):
            p.data = start + length * way
            values.append(penalty().item())
        assert values == sorted(values)
        assert values[0] == 0


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
