"""O-LoRA's parts: concatenation is the sum, compression the best there is, the penalty the overlap of two spans."""

import pytest
import torch

from learners import adapter
from learners.encode import encode
from learners.ewc import Inert
from learners.subspace import Orthogonality, basis, truncated
from learners.trainer import fit

RANK, INPUTS, OUTPUTS = 3, 12, 9


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def updates():
    """Two updates' factors, B and A each."""
    return [(normal(OUTPUTS, RANK, seed=n), normal(RANK, INPUTS, seed=n + 10)) for n in range(2)]


def test_concatenated_factors_are_the_sum_of_both_and_added_ones_are_not(updates):
    (b, a), (fresh_b, fresh_a) = updates
    wanted = b @ a + fresh_b @ fresh_a
    assert torch.allclose(torch.cat([b, fresh_b], 1) @ torch.cat([a, fresh_a]), wanted, atol=1e-12)
    assert not torch.allclose((b + fresh_b) @ (a + fresh_a), wanted, atol=0.1)


@pytest.mark.parametrize("rank", [1, 3, 5, 6, 8])
def test_compression_is_the_best_there_is(updates, rank):
    """Eckart and Young: no matrix of the rank is nearer than what the full decomposition of the product keeps."""
    (b, a), (fresh_b, fresh_a) = updates
    tall, wide = torch.cat([b, fresh_b], 1), torch.cat([a, fresh_a])
    u, values, v = torch.linalg.svd(tall @ wide)
    best = (u[:, :rank] * values[:rank]) @ v[:rank]
    new_b, new_a, found = truncated(tall, wide, rank)
    assert (new_b.shape, new_a.shape) == ((OUTPUTS, rank), (rank, INPUTS))
    assert torch.allclose(new_b @ new_a, best, atol=1e-10)
    assert torch.allclose(found, values[: len(found)], atol=1e-10)
    assert torch.allclose(new_b.norm(dim=0), new_a.norm(dim=1), atol=1e-10)
    cut = tall[:, :rank] @ wide[:rank]  # forgetting the later columns is of the same rank, and farther away
    error = (tall @ wide - best).norm()
    assert error == pytest.approx(float(values[rank:].norm()), abs=1e-10)
    assert rank >= 2 * RANK or (tall @ wide - cut).norm() > 1.05 * error


def test_it_never_forms_the_product():
    b, a = torch.ones(200_000, 2), torch.ones(2, 200_000)  # 320 GB
    new_b, new_a, _ = truncated(b, a, 1)
    assert float(new_b[0] @ new_a[:, 0]) == pytest.approx(2, rel=1e-5)


def test_a_basis_spans_the_rows_whatever_their_scale(updates):
    _, a = updates[0]
    directions = basis(a)
    assert torch.allclose(directions @ directions.T, torch.eye(RANK, dtype=torch.double), atol=1e-12)
    assert torch.allclose(a @ directions.T @ directions, a, atol=1e-12)
    again = basis(1e6 * normal(RANK, RANK, seed=5) @ a)
    assert torch.allclose(again.T @ again, directions.T @ directions, atol=1e-9)
    assert len(basis(torch.cat([a, a]))) == RANK, "rows that say the same count once"


def penalty_of(old, new, weight=1.0):
    return Orthogonality({"m.lora_A.weight": torch.cat([old, new]), "m.lora_B.weight": torch.zeros(1)}, len(old), weight)()


def test_the_penalty_is_what_of_the_new_rows_lies_in_the_old_ones_span(updates):
    (_, a), (_, fresh) = updates
    directions = basis(a)
    across = fresh - fresh @ directions.T @ directions
    along = normal(RANK, RANK, seed=7) @ a
    assert penalty_of(a, across).item() == pytest.approx(0, abs=1e-20)
    assert penalty_of(a, along, 2.0).item() == pytest.approx(2 * float(along.square().sum()))
    assert penalty_of(a, across + along).item() == pytest.approx(float(along.square().sum()))


def test_it_is_the_spans_and_not_how_they_are_written(updates):
    (_, a), (_, fresh) = updates
    turned, _ = torch.linalg.qr(normal(RANK, RANK, seed=8))
    value = penalty_of(a, fresh)
    assert torch.allclose(penalty_of(normal(RANK, RANK, seed=9) @ a, turned @ fresh), value)
    directions = basis(a)
    absolute = [(fresh @ written.T).abs().sum() for written in (directions, turned @ directions)]
    assert not torch.allclose(*absolute, rtol=0.02), "as the sum of absolute values does"


def test_a_penalty_that_stays_zero_fails_the_job():
    nothing = {"m.lora_A.weight": torch.cat([torch.eye(2, 4), torch.zeros(2, 4)])}
    with pytest.raises(Inert, match="olora_inert"):
        Orthogonality(nothing, 2, 1.0).outcome()


SETTINGS = {
    "learning_rate": 0.005,
    "epochs": 8,
    "batch_size": 8,
    "accumulation": 1,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "early_stopping_patience": 0,
    "seed": 3,
}


@pytest.fixture
def champion(adapted):
    """One that has learned something: B is not zero."""
    torch.manual_seed(1)
    for name, p in adapter.factors(adapted).items():
        p.data.normal_(std=0.2 if "lora_B" in name else 0.3)
    return adapted


def logits(model):
    ids = torch.arange(2, 60)[None]
    return model.eval()(input_ids=ids).logits.detach()


def test_a_stacked_adapter_computes_what_the_champion_does_and_compressed_it_is_the_champion(champion):
    wanted, base = logits(champion), champion.peft_config["default"]
    adapter.stack(champion, 5)
    assert {len(p) for name, p in adapter.factors(champion).items() if "lora_A" in name} == {8}
    assert (base.r, base.lora_alpha) == (8, 16)
    assert torch.allclose(logits(champion), wanted, atol=1e-5)
    assert adapter.compress(champion, 4) == pytest.approx(0, abs=1e-6)
    assert (base.r, base.lora_alpha) == (4, 8)
    assert {len(p) for name, p in adapter.factors(champion).items() if "lora_A" in name} == {4}
    assert torch.allclose(logits(champion), wanted, atol=1e-3)


def learned_beside(model, tokenizer, folder, weight):
    """What training left of a stacked adapter, and what the penalty says of it."""
    adapter.stack(model, 5)
    factors = adapter.factors(model)
    before = {name: p.detach().clone() for name, p in factors.items()}
    penalty = Orthogonality(factors, 4, weight)
    asked = [encode(tokenizer, [{"role": "user", "content": f"trains {n}"}], "no!", 64) for n in range(16)]
    fit(model, tokenizer, asked, [], SETTINGS, "float32", folder, lambda _: None, penalty)
    return before, adapter.factors(model), penalty


@pytest.mark.parametrize(("weight", "is_orthogonal"), [(50.0, True), (1e-12, False)])
def test_after_training_with_weight_the_new_directions_are_orthogonal_and_the_old_ones_untouched(
    champion, tokenizer, tmp_path, weight, is_orthogonal
):
    before, after, penalty = learned_beside(champion, tokenizer, tmp_path, weight)
    for name, p in after.items():
        old, new = (p[:4], p[4:]) if "lora_A" in name else (p[:, :4], p[:, 4:])
        was, was_new = (before[name][:4], before[name][4:]) if "lora_A" in name else (before[name][:, :4], before[name][:, 4:])
        assert torch.equal(old, was)
        assert not torch.equal(new, was_new)
    overlap = penalty.outcome()["overlap"]
    assert (overlap < 0.01) is is_orthogonal
    assert is_orthogonal or overlap > 0.05
