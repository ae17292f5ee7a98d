"""vLLM's own kernels for norms and activations against PyTorch's calls that they stand in for."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.activation import SiluAndMul

from service.engines.vllm_cpu_layers import rms_norm, silu_and_mul

NATIVE = object()


def norm(width, dtype, **changed):
    """A layer as vLLM has it, whose own way only says that it was gone."""
    weight = torch.nn.Parameter(torch.randn(width).to(dtype))
    plain = {"has_weight": True, "variance_size_override": None, "variance_epsilon": 1e-5, "weight": weight}
    return SimpleNamespace(**plain | {"forward_native": lambda *_: NATIVE} | changed)


def normed(x, layer):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight.data.double()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.02, "atol": 0.02}}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rows", [1, 7])
def test_a_norm_is_the_norm(dtype, rows):
    layer, x = norm(64, dtype), torch.randn(rows, 64).to(dtype)
    want = normed(x, layer)
    torch.testing.assert_close(rms_norm(layer, x).double(), want, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_residual_is_added_before_and_handed_on(dtype):
    layer, x, residual = norm(64, dtype), torch.randn(3, 64).to(dtype), torch.randn(3, 64).to(dtype)
    added = x.double() + residual.double()
    out, kept = rms_norm(layer, x.clone(), residual.clone())
    torch.testing.assert_close(out.double(), normed(added, layer), **CLOSE[dtype])
    torch.testing.assert_close(kept.double(), added, **CLOSE[dtype])


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (norm(64, torch.float32, variance_size_override=32), torch.randn(2, 64)),
        (norm(64, torch.float32, has_weight=False), torch.randn(2, 64)),
        (norm(64, torch.float32), torch.randn(2, 64).bfloat16()),
        (norm(60, torch.float32), torch.randn(2, 60)),
        (norm(64, torch.float32), torch.randn(2, 128)[:, :64]),
    ],
    ids=["part of the width", "no weight", "another precision", "no whole vectors", "columns of something wider"],
)
def test_what_the_kernel_does_not_know_goes_vllm_s_own_way(layer, x):
    assert rms_norm(layer, x) is NATIVE


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_gate_opens(dtype):
    x = torch.randn(5, 128).to(dtype)
    want = torch.nn.functional.silu(x[:, :64].double()) * x[:, 64:].double()
    torch.testing.assert_close(silu_and_mul(SiluAndMul, x).double(), want, **CLOSE[dtype])
    torch.testing.assert_close(SiluAndMul.forward_native(x).double(), want, rtol=0.05, atol=0.05)


def test_a_gate_of_another_shape_goes_vllm_s_own_way():
    layer = SimpleNamespace(forward_native=lambda _: NATIVE)
    assert silu_and_mul(layer, torch.randn(2, 60)) is NATIVE
