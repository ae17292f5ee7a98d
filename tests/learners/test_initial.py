"""How adapters begin: nothing changes yet, PiSSA and OLoRA learn what they would with a base of their own, all end plain."""

import json

import pytest
import torch

from learners import adapter, servable
from learners.initial import INITS, MIRRORED, balanced, begin, freeze_half
from learners.servable import Unservable

SHAPE = {"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0}
IDS = torch.tensor([[5, 9, 11, 30]], device="cuda" if torch.cuda.is_available() else "cpu")  # where `load_base` puts a model
SCALE = 2.0


@pytest.fixture
def weight():
    torch.manual_seed(1)
    return torch.randn(24, 16)


@pytest.mark.parametrize("init", [i for i in INITS if i != "default"])
def test_nothing_changes_yet_and_the_seed_decides(base, init):
    first, again, other = (
        adapter.attach(adapter.load_base(base.path, "float32")[0], None, **{**SHAPE, "seed": seed}, init=init)
        for seed in (0, 0, 1)
    )
    with adapter.without(first):
        alone = first(IDS).logits
    assert torch.allclose(first(IDS).logits, alone, atol=1e-4 * float(alone.abs().max()))
    a, b, c = (torch.cat([p.flatten() for p in adapter.factors(m).values()]) for m in (first, again, other))
    assert torch.equal(a, b)
    assert init in MIRRORED or not torch.equal(a, c)


def test_pissa_takes_the_principal_part(weight):
    a, b = begin("pissa", weight, 6, SCALE)
    u, sizes, v = torch.linalg.svd(weight)
    principal = (u[:, :3] * sizes[:3]) @ v[:3]
    assert torch.allclose(SCALE * b[:, :3] @ a[:3], principal, atol=1e-3)


def published(weight, init, data, steps):
    """As the papers have it: W - s B₀A₀ is frozen, A and B are trained; what the weight has become, less what it was."""
    a, b = begin(init, weight, 6, SCALE)
    a, b = a[:3].clone().requires_grad_(), b[:, :3].clone().requires_grad_()
    rest = weight - SCALE * (b @ a).detach()
    optimiser = torch.optim.AdamW([a, b], lr=0.02, weight_decay=0)
    for x, y in data[:steps]:
        optimiser.zero_grad()
        ((x @ (rest + SCALE * b @ a).T - y) ** 2).mean().backward()
        optimiser.step()
    return (rest + SCALE * b @ a - weight).detach()


def mirrored(weight, init, data, steps, freeze=freeze_half):
    a, b = (factor.requires_grad_() for factor in begin(init, weight, 6, SCALE))
    freeze(a, b)
    optimiser = torch.optim.AdamW([a, b], lr=0.02, weight_decay=0)
    for x, y in data[:steps]:
        optimiser.zero_grad()
        ((x @ (weight + SCALE * b @ a).T - y) ** 2).mean().backward()
        optimiser.step()
    return a.detach(), b.detach()


@pytest.fixture
def data():
    torch.manual_seed(2)
    return [(torch.randn(8, 16), torch.randn(8, 24)) for _ in range(20)]


@pytest.mark.parametrize("init", sorted(MIRRORED))
def test_half_of_the_rank_against_a_frozen_half_learns_what_a_changed_base_would(weight, init, data):
    wanted = published(weight, init, data, 20)
    a, b = mirrored(weight, init, data, 20)
    assert torch.allclose(SCALE * b @ a, wanted, atol=2e-3)
    assert wanted.abs().max() > 0.1
    a, b = mirrored(weight, init, data, 20, freeze=lambda *_: None)
    assert not torch.allclose(SCALE * b @ a, wanted, atol=2e-2), "with both halves free it is another method"


def in_16_bits(a, b):
    return b.bfloat16().float() @ a.bfloat16().float()


def test_balanced_factors_have_the_same_product_and_bear_16_bits(weight, data):
    a, b = mirrored(weight, "pissa", data, 3)
    x, y = balanced(a, b)
    product = b @ a
    assert torch.allclose(y @ x, product, atol=1e-5)
    assert torch.allclose(x @ x.T, y.T @ y, atol=1e-5)
    raw, settled = ((in_16_bits(*pair) - product).norm() / product.norm() for pair in ((a, b), (x, y)))
    assert settled < 0.01
    assert raw > 3 * settled, "the principal part and its mirror image drown what was learned"


@pytest.mark.parametrize(("init", "rank", "told"), [("orthogonal", 3, "even"), ("pissa", 34, "take a smaller rank")])
def test_a_rank_that_does_not_fit_is_refused(weight, init, rank, told):
    with pytest.raises(ValueError, match=told):
        begin(init, weight, rank, SCALE)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_written_and_read_back(model, base, tmp_path, rslora):
    adapted = adapter.attach(model, None, **SHAPE, init="orthogonal", rslora=rslora)
    with torch.no_grad():
        for factor in adapter.factors(adapted).values():
            factor.add_(0.02)
    adapter.write(adapted, tmp_path / "v1", "tiny")
    servable.check(tmp_path / "v1", 16, base.path)
    config = json.loads((tmp_path / "v1" / servable.CONFIG).read_text())
    assert (config["use_rslora"], config["init_lora_weights"], config["r"], config["lora_alpha"]) == (rslora, True, 4, 8)
    again = adapter.attach(adapter.load_base(base.path, "float32")[0], tmp_path / "v1", **SHAPE, rslora=rslora)
    assert torch.allclose(again(IDS).logits, adapted(IDS).logits, atol=1e-5)
    scales = {module.scaling["default"] for module in adapter._layers(again)}
    assert scales == {4.0 if rslora else 2.0}
    with pytest.raises(Unservable, match="a line keeps its shape"):
        adapter.attach(adapter.load_base(base.path, "float32")[0], tmp_path / "v1", **SHAPE, rslora=not rslora)


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "loftq"])
def test_an_adapter_that_was_trained_beside_a_changed_base_is_refused(written, init):
    config = json.loads((written / servable.CONFIG).read_text())
    (written / servable.CONFIG).write_text(json.dumps({**config, "init_lora_weights": init}))
    with pytest.raises(Unservable, match="init_lora_weights"):
        servable.check(written, 16)
