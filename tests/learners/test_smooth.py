"""Evening out a layer's inputs: the layer stays to the bit, rounding its inputs costs less, and what it does not fit is left alone."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from learners import smooth as smoothing
from learners.calibrate import _entry, _layers, _through
from learners.quantize import fake_int8
from learners.smooth import MAKERS, smooth
from tests.learners.conftest import random_llama

USERS = [name for users in MAKERS.values() for name in users]


@pytest.fixture
def layer():
    """The first layer of a random Llama, two of whose inputs are far larger than the rest, as large models' are."""
    torch.manual_seed(0)
    model = random_llama().float().eval()
    first = _layers(model)[0]
    for norm in (first.input_layernorm, first.post_attention_layernorm):
        norm.weight.data[[3, 17]] *= 64
    hidden, options = _entry(model, [torch.randint(0, 200, (4, 32)) for _ in range(3)])
    return first, hidden, partial(_through, options=options[0])


def lost(layer, batch, through):
    """By what each product would be off if its inputs were rounded as a W8A8 engine does, as a mean square."""
    found = {}

    def see(name, module, said):
        found[name] = linear(fake_int8(said[0]) - said[0], module.weight).square().mean()

    hooks = [layer.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in USERS]
    through(layer, batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_outputs_stay_to_the_bit_and_rounding_costs_less(layer):
    first, hidden, through = layer
    wanted = [through(first, batch) for batch in hidden]
    before = lost(first, hidden[0], through)
    weights = {name: parameter.clone() for name, parameter in first.named_parameters()}
    smooth(first, hidden, partial(through, first))
    assert all(torch.equal(through(first, batch), told) for batch, told in zip(hidden, wanted, strict=True))
    after = lost(first, hidden[0], through)
    assert all(after[name] < before[name] / 4 for name in USERS if name != "mlp.down_proj")  # whose inputs have no large ones
    assert after["mlp.down_proj"] < before["mlp.down_proj"] * 1.1
    changed = {name for name, parameter in first.named_parameters() if not torch.equal(parameter, weights[name])}
    assert changed == {f"{name}.weight" for name in [*MAKERS, *USERS]}
    for name in changed:  # powers of two: bf16 holds them as exactly as fp32
        shares = first.get_parameter(name) / weights[name]
        assert torch.equal(shares.log2(), shares.log2().round())


@torch.no_grad()
def test_a_factor_on_one_side_only_is_told_apart(layer):
    """The well-known slip: weights multiplied, inputs not divided."""
    first, hidden, through = layer
    wrong = copy.deepcopy(first)
    smooth(first, hidden, partial(through, first))
    wrong.self_attn.q_proj.weight.copy_(first.self_attn.q_proj.weight)
    assert not torch.allclose(through(wrong, hidden[0]), through(first, hidden[0]), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_norm_that_computes_otherwise_is_left_alone(layer, monkeypatch):
    """Gemma's norms multiply by 1 + weight: dividing the weight is not dividing the inputs."""
    first, hidden, through = layer
    kind = type(first.input_layernorm)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: plain(self, x) + x * 0.01)
    weights = {name: parameter.clone() for name, parameter in first.named_parameters()}
    smooth(first, hidden, partial(through, first))
    kept = {name for name, parameter in first.named_parameters() if torch.equal(parameter, weights[name])}
    assert {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight"} <= kept


@torch.no_grad()
def test_inputs_that_calibration_never_saw_stay(layer):
    first, hidden, through = layer
    first.input_layernorm.weight[5] = 0.0
    column = first.self_attn.q_proj.weight[:, 5].clone()
    smooth(first, hidden, partial(through, first))
    assert torch.equal(first.self_attn.q_proj.weight[:, 5], column)


def test_no_factor_is_larger_than_the_most():
    factor = smoothing._factor(torch.tensor([1e-6, 1.0, 1e6]), torch.ones(3))
    assert factor.tolist() == [1 / smoothing.MOST, 1.0, smoothing.MOST]
