"""Rounding against closed forms and enumeration, with round-to-nearest as the control that must be worse."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.quantize import SCHEMES, best_grid, fake_float8, fake_int8, gptq, pack, round_to_nearest, unpack

with warnings.catch_warnings(action="ignore"):  # it compiles at import, with parts of torch that torch calls old
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

INT8, FP8, INT4 = (SCHEMES[name] for name in ("int8", "fp8", "int4"))
GRIDS = pytest.mark.parametrize("scheme", [INT8, FP8, INT4], ids=["int8", "fp8", "int4"])  # int8-layers has int8's grid
FLOATS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
FLOATS = FLOATS[FLOATS.isfinite()].sort().values
"""Every float of eight bits, by its bits."""


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(count, width, rank=8):
    """Inputs that lean on each other, as a model's do: few directions, and a little noise; some features are large."""
    correlated = drawn(count, rank) @ drawn(rank, width, seed=1) + 0.3 * drawn(count, width, seed=2)
    return correlated * torch.linspace(0.3, 3, width)


def nearest_code(scaled, offset, scheme):
    """By the definition of each grid; of two floats as near as each other, either."""
    if scheme is FP8:
        return FLOATS[(scaled[..., None] - FLOATS).abs().argmin(-1)]
    return (scaled.round() + offset).clamp(scheme.lowest, scheme.highest)


def output_error(weight, found, inputs):
    return (inputs @ (weight - found.dequantized()).t()).square().mean().item()


@GRIDS
def test_error_feedback_beats_rounding_to_nearest(scheme):
    weight, inputs = drawn(48, 256, seed=3), inputs_of(512, 256)
    moments = inputs.t() @ inputs / len(inputs)
    ours = output_error(weight, gptq(weight, moments, scheme), inputs)
    nearest = output_error(weight, round_to_nearest(weight, scheme), inputs)
    assert ours < 0.5 * nearest


@GRIDS
def test_without_correlation_there_is_nothing_to_feed_back(scheme):
    """The closed form: with moments that are a multiple of one, each weight is rounded by itself, on the best grid."""
    weight = drawn(8, 64)
    scale, zero = best_grid(weight, torch.ones(64), scheme)
    wide, offset = scale.float().repeat_interleave(64 // scale.shape[1], 1), zero.repeat_interleave(64 // scale.shape[1], 1)
    nearest = nearest_code(weight / wide, offset, scheme)
    assert torch.equal(gptq(weight, 3.0 * torch.eye(64), scheme).codes.float(), nearest)


def test_two_inputs_are_rounded_as_an_enumeration_says():
    """Of all pairs of integers GPTQ's is the one that its rule gives: the first nearest, the second by what is left.

    Two inputs that are nearly the same: the second takes the first's error over in full.
    """
    scheme = replace(INT8, bits=3)
    moments = torch.tensor([[2.0, 1.999], [1.999, 2.0]])
    weight = torch.tensor(
        [
            [
                0.40,
                0.40,
            ],
            [3.0, -3.0],
        ]
    )
    found = gptq(weight, moments, scheme)
    step = found.scale.float()
    error = weight[0] - found.dequantized()[0]
    assert abs(error.sum()) <= step[0, 0] / 2 + 1e-6  # what the two give together is off by half a step, not by one

    choices = itertools.product(range(scheme.lowest, scheme.highest + 1), repeat=2)

    def loss(pair):
        left = weight[0] - torch.tensor(pair) * step[0]
        return (left @ moments @ left).item()

    assert loss(found.codes[0].tolist()) <= 1.05 * min(loss(pair) for pair in choices)


@GRIDS
def test_inputs_that_calibration_never_saw_are_rounded_by_themselves(scheme):
    weight, inputs = drawn(8, 64), inputs_of(256, 64)
    inputs[:, 5] = 0
    found = gptq(weight, inputs.t() @ inputs / 256, scheme).dequantized()
    step = gptq(weight, inputs.t() @ inputs / 256, scheme).scale.float().repeat_interleave(max(scheme.group, 32), 1)
    assert torch.isfinite(found).all()
    assert ((found - weight)[:, 5].abs() <= 0.51 * step[:, 5] + 0.3 * weight[:, 5].abs()).all()


@GRIDS
def test_the_grid_is_never_worse_than_that_of_the_largest(scheme):
    weight = drawn(16, 128) ** 3  # heavy tails: cutting a few off makes the rest finer
    ones = torch.ones(128)
    scale, zero = best_grid(weight, ones, scheme)
    plain = round_to_nearest(weight, scheme)
    wide, offset = (part.float().repeat_interleave(128 // scale.shape[1], 1) for part in (scale, zero))
    ours = (nearest_code(weight / wide, offset, scheme) - offset) * wide
    lost = [(weight - found).square().sum().item() for found in (ours, plain.dequantized())]
    assert lost[0] <= lost[1]
    assert lost[0] < lost[1] or scheme is INT8  # of eight bits even heavy tails need the whole range


@GRIDS
def test_what_lies_on_the_grid_stays(scheme):
    weight = round_to_nearest(drawn(8, 64), scheme).dequantized()
    torch.testing.assert_close(round_to_nearest(weight, scheme).dequantized(), weight, rtol=0.01, atol=1e-3)


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([0, 1]), st.sampled_from([4, 8]), st.integers(0, 99))
def test_packing_is_compressed_tensors_own(rows, columns, dim, bits, seed):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=draw).to(torch.int8)
    words = pack(values, bits, dim)
    assert torch.equal(words, pack_to_int32(values, bits, packed_dim=dim))
    assert torch.equal(unpack(words, bits, values.shape[dim], dim), values)
    assert torch.equal(unpack_from_int32(words, bits, values.shape, packed_dim=dim), values)


def test_each_token_is_rounded_by_its_own_largest():
    tokens = torch.tensor([[127.0, 0.4, -64.0], [1270.0, 4.0, 6.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(fake_int8(tokens), torch.tensor([[127.0, 0.0, -64.0], [1270.0, 0.0, 10.0], [0.0, 0.0, 0.0]]))


def test_each_token_is_rounded_to_floats_by_its_own_largest():
    tokens = drawn(5, 64) * torch.logspace(-3, 3, 64)
    scale = tokens.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(fake_float8(tokens), nearest_code(tokens / scale, 0, FP8) * scale)
    assert torch.equal(fake_float8(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_a_layer_of_floats_is_what_vllm_computes():
    """By its own rounding of the inputs and its own product, for which a CPU is slow but right."""
    with warnings.catch_warnings(action="ignore"):
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
        from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
    weight, inputs = round_to_nearest(drawn(16, 64), FP8), drawn(5, 64, seed=1) * torch.logspace(-2, 2, 64)
    with set_current_vllm_config(VllmConfig()):
        codes, scale = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN).forward_native(inputs)
    theirs = torch._scaled_mm(codes, weight.codes.t(), torch.ones(1), torch.ones(1), out_dtype=torch.float32)
    theirs = theirs * scale * weight.scale.float().t()
    torch.testing.assert_close(fake_float8(inputs), codes.float() * scale)
    torch.testing.assert_close(fake_float8(inputs) @ weight.dequantized().t(), theirs, rtol=1e-4, atol=1e-4)


def test_floats_keep_what_is_small_beside_what_is_large():
    """Why their inputs need no smoothing: a step is a share of the value, where integers have one step for all."""
    token = torch.tensor([[1000.0, 1.0, 0.1]])
    assert ((fake_float8(token) - token).abs() / token).max() < 1 / 16
    assert fake_int8(token)[0, 1:].tolist() == [0.0, 0.0]
