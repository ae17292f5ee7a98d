"""The penalty on the product of the factors: its Gram form against the dense one, blind to the gauge; its Fisher by enumeration."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learners import adapter, product
from learners.encode import IGNORED, Encoded, collate, reply_logits
from learners.ewc import PRODUCT, Ewc, Inert, Penalty
from learners.naive import Naive
from learners.product import GRADIENTS, INPUTS, TOKENS, A, ProductPenalty, joined, moments

SCALE, S = 0.3, 2.0
NAMES = ("m.lora_A.weight", "m.lora_B.weight")


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def factors():
    return {NAMES[0]: torch.nn.Parameter(normal(3, 7)), NAMES[1]: torch.nn.Parameter(normal(5, 3, seed=1))}


@pytest.fixture
def state():
    return {f"{PRODUCT}m{GRADIENTS}": normal(5, seed=2).abs(), f"{PRODUCT}m{INPUTS}": normal(7, seed=3).abs()}


def dense(factors, state, anchor):
    apart = S * (factors[NAMES[1]] @ factors[NAMES[0]] - anchor)
    g, x = state.values()
    return SCALE / 2 * (g[:, None] * x * apart.square()).sum()


def test_t10_the_gram_form_is_the_dense_one_and_so_is_its_gradient(factors, state):
    anchor = (factors[NAMES[1]] @ factors[NAMES[0]]).detach()
    penalty = ProductPenalty(factors, state, SCALE, S)
    assert penalty() == 0
    for n, p in enumerate(factors.values()):
        p.data += normal(*p.shape, seed=n + 5)
    found, wanted = penalty(), dense(factors, state, anchor)
    assert torch.allclose(found, wanted, rtol=1e-10)
    pairs = zip(*(torch.autograd.grad(value, list(factors.values())) for value in (found, wanted)), strict=True)
    assert all(torch.allclose(*pair, rtol=1e-10) for pair in pairs)


def difference_s_product(b, a, b_then, a_then, g, x):
    """The well-known wrong one: the product of the factors' differences in place of the difference of their products."""
    return (g[:, None] * x * ((b - b_then) @ (a - a_then)).square()).sum()


def root_of_one_side(b, a, b_then, a_then, g, x):
    """Another: a side's weight at its root, as if the squares were taken of it too."""
    return (g[:, None].sqrt() * x * (b @ a - b_then @ a_then).square()).sum()


def separate_factors(b, a, b_then, a_then, g, x):
    """And what it is not either: each factor's own way, weighed by its own side."""
    return (g[:, None] * (b - b_then).square()).sum() + (x * (a - a_then).square()).sum()


@pytest.mark.parametrize("wrong", [difference_s_product, root_of_one_side, separate_factors])
def test_t10_the_wrong_forms_are_not_the_dense_one(factors, state, monkeypatch, wrong):
    anchor = (factors[NAMES[1]] @ factors[NAMES[0]]).detach()
    monkeypatch.setattr(product, "_norm", wrong)
    penalty = ProductPenalty(factors, state, SCALE, S)
    for n, p in enumerate(factors.values()):
        p.data += normal(*p.shape, seed=n + 5)
    assert not torch.allclose(penalty(), dense(factors, state, anchor), rtol=0.1)


def test_near_the_anchor_nothing_is_lost_in_single_precision(factors, state):
    """The textbook's three traces are, since each is huge beside their difference."""
    single = {name: torch.nn.Parameter(p.detach().float()) for name, p in factors.items()}
    penalty = ProductPenalty(single, {name: v.float() for name, v in state.items()}, SCALE, S)
    before = {name: p.detach().double() for name, p in single.items()}
    for n, p in enumerate(single.values()):
        p.data += 1e-5 * normal(*p.shape, seed=n + 5).float()
    exact = {name: p.detach().double() for name, p in single.items()}
    wanted = float(dense(exact, state, before[NAMES[1]] @ before[NAMES[0]]))
    assert penalty().item() == pytest.approx(wanted, rel=1e-4)
    g, x = (v.float() for v in state.values())
    grams = [
        (
            (one[NAMES[1]].float().T @ (g[:, None] * two[NAMES[1]].float()))
            * ((one[NAMES[0]].float() * x) @ two[NAMES[0]].float().T)
        ).sum()
        for one, two in ((exact, exact), (exact, before), (before, before))
    ]
    assert SCALE / 2 * S * S * float(grams[0] - 2 * grams[1] + grams[2]) != pytest.approx(wanted, rel=0.1)


def test_other_factors_of_the_same_function_cost_nothing(factors, state):
    penalty = ProductPenalty(factors, state, SCALE, S)
    by_factor = Penalty(factors, {name: torch.ones_like(p) for name, p in factors.items()}, SCALE)
    turn = normal(3, 3, seed=9)
    factors[NAMES[0]].data, factors[NAMES[1]].data = turn @ factors[NAMES[0]], factors[NAMES[1]] @ torch.linalg.inv(turn)
    assert abs(penalty().item()) < 1e-10
    assert by_factor().item() > 0.1


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / rank", "alpha / sqrt(rank)"])
def test_its_scale_is_the_adapter_s_own(model, rslora):
    """Against the dense change of each layer as peft serves it; by the other kind of scale it is off by the rank."""
    adapted = adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0, rslora=rslora)
    factors = adapter.factors(adapted)
    layers = {name.removesuffix(A): adapted.get_submodule(name.removesuffix(A)) for name in factors if name.endswith(A)}
    state = {}
    for name, layer in layers.items():
        state |= {f"{PRODUCT}{name}{GRADIENTS}": torch.ones(layer.out_features)}
        state |= {f"{PRODUCT}{name}{INPUTS}": torch.ones(layer.in_features)}
    told = {"rank": 4, "alpha": 8, "ewc_kappa": 1.0, "ewc_form": "product"}
    right, wrong = (Ewc(Naive()).penalty(factors, state, 10, {**told, "rslora": kind}) for kind in (rslora, not rslora))
    before = [layer.get_delta_weight("default").detach() for layer in layers.values()]
    for n, p in enumerate(factors.values()):
        p.data += 0.1 * normal(*p.shape, seed=n).float()
    moved = [layer.get_delta_weight("default").detach() - old for layer, old in zip(layers.values(), before, strict=True)]
    dense = sum(float(apart.square().sum()) for apart in moved) / 10 / 2
    assert right().item() == pytest.approx(dense, rel=1e-4)
    assert wrong().item() == pytest.approx(dense / 4 if rslora else dense * 4, rel=1e-4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {name.replace("m.", "other."): v for name, v in state.items()},
        lambda state: {name: v[:-1] for name, v in state.items()},
        lambda state: {name: v for name, v in state.items() if name.endswith(GRADIENTS)},
        lambda state: {name: 0 * v for name, v in state.items()},
        lambda state: {name: -v if name.endswith(GRADIENTS) else v for name, v in state.items()},
        lambda state: {name: v.clone().index_fill_(0, torch.tensor([1]), torch.nan) for name, v in state.items()},
        lambda state: {name: v / 0 if name.endswith(INPUTS) else v for name, v in state.items()},
    ],
    ids=["other layers", "another shape", "no inputs", "zero", "negative", "not a number", "infinite"],
)
def test_a_fisher_that_does_not_fit_fails_the_job(factors, state, damage):
    with pytest.raises(Inert, match="ewc_inert"):
        ProductPenalty(factors, damage(state), SCALE, S)


@pytest.fixture
def tiny():
    """A language model of seven tokens with an adapter on it, B not zero: all labels can be enumerated."""
    torch.manual_seed(0)
    shape = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.7}
    model = adapter.attach(LlamaForCausalLM(LlamaConfig(**shape, **tokens)), None, rank=2, alpha=4, dropout=0.5, seed=0)
    for parameter in adapter.factors(model).values():
        parameter.data.normal_(std=0.3)
    return model


TEXTS = [Encoded([3, 4, 5, 2, 1], [IGNORED, IGNORED, 5, 2, 1]), Encoded([2, 6, 1], [IGNORED, 6, 1], 2.0)]
LAYER = "base_model.model.model.layers.0.mlp.down_proj"


def enumerated(model):
    """g and x of one layer: over all labels of each reply token, by their masses; nothing sampled, nothing padded."""
    seen = []
    model.eval()
    handle = model.get_submodule(LAYER).register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    gradients, inputs, positions = 0, 0, 0
    for example in TEXTS:
        logits, _ = reply_logits(model, collate([example], 0))
        given, output = seen.pop()
        for row in logits[0].log_softmax(-1):
            for log in row:
                (gradient,) = torch.autograd.grad(log, output, retain_graph=True)
                gradients += example.weight * log.detach().exp() * gradient.square().sum((0, 1))
        inputs += example.weight * given.detach().square().sum((0, 1))
        positions += example.weight * given.shape[1]
    handle.remove()
    return gradients / sum(e.reply_length for e in TEXTS), inputs / positions


def test_its_fisher_is_the_enumeration_of_all_labels(tiny):
    """Of replies of unlike lengths and weights, padded in one batch."""
    parameters = adapter.factors(tiny)
    draws = [moments(tiny.train(), parameters, TEXTS, 0, seed) for seed in range(300)]
    assert tiny.training
    g, x = enumerated(tiny)
    assert torch.allclose(draws[0][f"{PRODUCT}{LAYER}{INPUTS}"], x, rtol=1e-4)
    mean = torch.stack([one[f"{PRODUCT}{LAYER}{GRADIENTS}"] for one in draws]).mean(0)
    assert float((mean - g).abs().sum() / g.abs().sum()) < 0.15


def test_over_versions_gradients_add_up_and_inputs_are_averaged():
    def version(g, x):
        return {f"{PRODUCT}m{GRADIENTS}": torch.tensor([g]), f"{PRODUCT}m{INPUTS}": torch.tensor([x])}

    first = joined({}, version(2.0, 1.0), 10, 0.5)
    second = joined(first, version(4.0, 3.0), 20, 0.5)
    assert {n.split(".")[-1]: float(v) for n, v in first.items()} == {"tokens": 10, "gradients": 20, "inputs": 1}
    nothing = joined(first, {}, 0, 0.5)
    assert {n.split(".")[-1]: float(v) for n, v in nothing.items()} == {"tokens": 5, "gradients": 10, "inputs": 1}
    assert float(second[TOKENS]) == 25
    assert float(second[f"{PRODUCT}m{GRADIENTS}"]) == 0.5 * 20 + 20 * 4
    assert float(second[f"{PRODUCT}m{INPUTS}"]) == pytest.approx((5 * 1 + 20 * 3) / 25)


def test_each_form_reads_what_its_own_left_and_begins_anew_after_the_other(tiny):
    ewc, parameters = Ewc(Naive()), adapter.factors(tiny)
    settings = {"seed": 0, "rank": 2, "alpha": 4, "ewc_kappa": 1.0, "ewc_gamma": 0.9, "ewc_sequences": 8}
    forms = {form: {**settings, "ewc_form": form} for form in ("factors", "product")}
    left = {form: ewc.consolidate(tiny, parameters, {}, TEXTS, 0, told) for form, told in forms.items()}
    kinds = {form: type(ewc.penalty(parameters, left[form], 5, told)) for form, told in forms.items()}
    assert kinds == {"factors": Penalty, "product": ProductPenalty}
    assert ewc.penalty(parameters, left["product"], 5, forms["factors"]) is None
    assert ewc.penalty(parameters, left["factors"], 5, forms["product"]) is None
    again = ewc.consolidate(tiny, parameters, left["product"], TEXTS, 0, forms["product"])
    assert float(again[TOKENS]) == pytest.approx(1.9 * 5)
