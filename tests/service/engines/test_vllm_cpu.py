"""The grouped kernels against a plain loop over rows; no engine is started."""

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.lora.layers import base_linear, utils
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from service.engines import vllm_cpu, vllm_cpu_layers
from service.engines.vllm_cpu import FEW_ROWS, FEWEST_ROWS, GroupedPunicaWrapper, divide, fused, register
from service.engines.vllm_rows import Int8Rows

SLOTS, RANK, INPUT, WIDTHS, SCALE = 3, 4, 10, (6, 2, 2), 0.5
IDS = [11, None, 12]
"""Which adapter lies in which slot."""


def weights(dtype=torch.float32, rank=RANK, widths=WIDTHS):
    """Factors in one storage."""
    draw = torch.Generator().manual_seed(0)
    a = [torch.randn(SLOTS, 1, rank, INPUT, generator=draw).to(dtype) for _ in widths]
    b = [torch.randn(SLOTS, 1, width, rank, generator=draw).to(dtype) for width in widths]
    both = fused(a, b)
    for views, values in zip(both, (a, b), strict=True):
        for view, value in zip(views, values, strict=True):
            view.copy_(value)  # as vLLM's layers fill them, in place
    return both


def plain(stacked, dtype):
    """The same factors as vLLM's own layers have them."""
    return tuple(one.to(dtype).contiguous() for one in stacked)


def batch(rows, dtype=torch.float32, width=10):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, INPUT, generator=draw).to(dtype), torch.randn(rows, width, generator=draw).to(dtype)


def expected(y, x, a, b, slots, *, skips_bare=True):
    """Each row by itself. With `skips_bare` False: what vLLM's kernels do, where slot -1 is the last one."""
    out = y.clone()
    for row, slot in enumerate(slots):
        if slot < 0 and skips_bare:
            continue
        parts = [b[i][slot, 0] @ (a[i][slot, 0] @ x[row]) for i in range(len(WIDTHS))]
        out[row] += SCALE * torch.cat(parts)
    return out


def wrapper(ids, kind=GroupedPunicaWrapper, rows=64):
    """A wrapper that was told of a batch whose rows have the adapters `ids` (0: none)."""
    made = kind(max_num_batched_tokens=rows, max_batches=rows, device="cpu")
    # vLLM says of every batch on a CPU that it is a prefill.
    mapping = LoRAMapping(index_mapping=tuple(ids), prompt_mapping=tuple(ids), is_prefill=True)
    made.update_metadata(mapping, IDS, SLOTS, 100)
    return made


MIXES = {
    "mixed": [11, 12, 0, 11, 0, 12, 11],
    "runs": [11, 11, 11, 0, 0, 12, 12],
    "one adapter": [12] * 5,
    "base only": [0] * 5,
    "single row": [11],
    "bare between": [11, 0, 11],
}


@pytest.mark.parametrize("ids", MIXES.values(), ids=MIXES)
def test_groups_equal_rows(has_kernel, ids):
    a, b = weights()
    x, y = batch(len(ids))
    slots = [IDS.index(i) if i else -1 for i in ids]
    want = expected(y, x, a, b, slots)
    wrapper(ids).add_lora_linear(y, x, a, b, SCALE, WIDTHS)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["kernel", "without a compiler"])
def has_kernel(request, monkeypatch):
    """Both ways that few rows may go; with the kernel too a run of 33 is long here."""
    monkeypatch.setattr(vllm_cpu, "FEW_ROWS", FEWEST_ROWS)
    if request.param != "kernel":
        monkeypatch.setattr(vllm_cpu.native, "load", lambda: None)
    return request.param == "kernel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=st.lists(
        st.tuples(st.sampled_from([0, 11, 12]), st.sampled_from([1, 2, FEWEST_ROWS, FEWEST_ROWS + 1])), min_size=1, max_size=9
    ),
    rank=st.integers(1, 9),
    widths=st.sampled_from([(6, 2, 2), (5, 5), (7,)]),
)
def test_rows_with_an_adapter_equal_vllm_s_own_kernels(has_kernel, dtype, runs, rank, widths):
    ids = [one for adapter, length in runs for one in [adapter] * length]
    a, b = weights(dtype, rank, widths)
    x, y = batch(len(ids), dtype, sum(widths))
    ours, theirs = y.clone(), y.clone()
    wrapper(ids, rows=512).add_lora_linear(ours, x, a, b, SCALE, widths)
    wrapper(ids, PunicaWrapperCPU, rows=512).add_lora_linear(theirs, x, plain(a, dtype), plain(b, dtype), SCALE, widths)
    has_adapter = torch.tensor(ids) > 0
    # bf16 has 8 bits: both kernels round within a few units of the largest terms, at different places.
    exact, half = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 0.05, "atol": 0.2}
    torch.testing.assert_close(ours[has_adapter], theirs[has_adapter], **(exact if dtype is torch.float32 else half))
    assert torch.equal(ours[~has_adapter], y[~has_adapter])


def test_the_wrong_variant_is_told_apart():
    """Rows without an adapter must not get the last slot's (vllm#48421)."""
    ids = MIXES["mixed"]
    a, b = weights()
    x, y = batch(len(ids))
    wrong = expected(y, x, a, b, [IDS.index(i) if i else -1 for i in ids], skips_bare=False)
    wrapper(ids).add_lora_linear(y, x, a, b, SCALE, WIDTHS)
    assert not torch.allclose(y, wrong, rtol=1e-3, atol=1e-3)


def test_bare_and_padded_rows_are_untouched():
    ids = [11, 0, 12, 0]
    a, b = weights()
    x, y = batch(len(ids) + 3)
    before = y.clone()
    wrapper(ids).add_lora_linear(y, x, a, b, SCALE, WIDTHS)
    untouched = [1, 3, 4, 5, 6]
    assert torch.equal(y[untouched], before[untouched])
    assert not torch.equal(y[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(
    ("ids", "is_long"),
    [(MIXES["mixed"], False), (MIXES["mixed"] * 30, False), ([11] * 60 + [0] + [12] * 90 + [11] * 40, True)],
    ids=["few rows", "many rows", "long runs"],
)
def test_half_precision_and_batched_shapes(has_kernel, ids, is_long):
    a, b = weights(torch.bfloat16)
    x, y = batch(len(ids), torch.bfloat16)
    slots = [IDS.index(i) if i else -1 for i in ids]
    want = expected(y.float(), x.float(), plain(a, torch.float32), plain(b, torch.float32), slots)
    shaped = y.view(1, len(ids), -1)
    wrapper(ids, rows=256).add_lora_linear(shaped, x.view(1, len(ids), -1), a, b, SCALE, WIDTHS)
    # The kernel rounds once, the sum to bf16, by half a unit in 256; products of PyTorch's round what is between them too.
    close = {"rtol": 2**-8, "atol": 1e-5} if has_kernel and not is_long else {"rtol": 0.05, "atol": 0.2}
    torch.testing.assert_close(shaped[0].float(), want, **close)


def test_rows_need_not_lie_side_by_side():
    """Inputs and outputs may be columns of something wider."""
    ids = MIXES["mixed"]
    a, b = weights()
    x, y = batch(len(ids))
    want = expected(y, x, a, b, [IDS.index(i) if i else -1 for i in ids])
    wide_x, wide_y = torch.zeros(len(ids), INPUT + 3), torch.zeros(len(ids), y.shape[1] + 5)
    wide_x[:, :INPUT], wide_y[:, : y.shape[1]] = x, y
    wrapper(ids).add_lora_linear(wide_y[:, : y.shape[1]], wide_x[:, :INPUT], a, b, SCALE, WIDTHS)
    torch.testing.assert_close(wide_y[:, : y.shape[1]], want, rtol=1e-5, atol=1e-5)
    assert not wide_y[:, y.shape[1] :].any()


def test_the_next_batch_forgets_the_last():
    a, b = weights()
    made = wrapper([11, 11, 11])
    made.update_metadata(LoRAMapping(index_mapping=(0, 12), prompt_mapping=(0, 12)), IDS, SLOTS, 100)
    x, y = batch(2)
    want = expected(y, x, a, b, [-1, 2])
    made.add_lora_linear(y, x, a, b, SCALE, WIDTHS)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_many_rows_of_an_adapter_go_apart_from_few_ones():
    few, many = divide(torch.tensor([1, -1, 2]), 3)
    assert (few.slots.tolist(), few.count, many) == ([1, -1, 2], 3, ())
    assert divide(torch.tensor([-1, -1]), 1) == (None, ())
    few, many = divide(torch.tensor([2, 1, 1, 1, 1, -1, 2]), 3)
    assert few.slots.tolist() == [2, -1, -1, -1, -1, -1, 2]
    assert many == ((1, slice(1, 5)),)
    few, many = divide(torch.tensor([1, 1, 1, 1, -1, 1, 1, 1, 1]), 3)
    assert few is None
    assert many == ((1, slice(0, 4)), (1, slice(5, 9)))


@pytest.mark.parametrize(("length", "is_many"), [(FEW_ROWS, False), (FEW_ROWS + 1, True)])
def test_prompts_are_the_kernel_s_up_to_hundreds_of_rows(length, is_many):
    assert bool(wrapper([11] * length, rows=2 * FEW_ROWS).many) == is_many


LAYERS = (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA)


@pytest.fixture
def platform(monkeypatch):
    """vLLM as it is before the plug-in, and put back after it."""
    kind = type(current_platform)
    monkeypatch.setattr(kind, "get_punica_wrapper", classmethod(lambda _: "vllm's own"))
    monkeypatch.setattr(kind, "is_cpu", lambda _: True)
    for module in (utils, base_linear):
        monkeypatch.setattr(module, "_get_lora_device", own_device)
    for layer in LAYERS:
        monkeypatch.setattr(layer, "create_lora_weights", own_storage)
    for layer in (RMSNorm, SiluAndMul):
        monkeypatch.setattr(layer, "forward_cpu", own_forward)
    for layer, name in ((CompressedTensorsConfig, "get_quant_method"), (ParallelLMHead, "tie_weights"), (Int8Rows, "has_kernel")):
        monkeypatch.setattr(layer, name, vars(layer)[name])
    return current_platform


def own_device(layer):
    return layer.weight.device


def own_forward(layer, x):
    return x


def own_storage(layer):
    layer.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, INPUT, dtype=torch.bfloat16) for _ in WIDTHS)
    layer.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, width, RANK, dtype=torch.bfloat16) for width in WIDTHS)


def test_registering_twice_is_registering_once(platform):
    register()
    mended = utils._get_lora_device
    register()
    assert platform.get_punica_wrapper() == "service.engines.vllm_cpu.GroupedPunicaWrapper"
    assert utils._get_lora_device is base_linear._get_lora_device is mended
    assert (RMSNorm.forward_cpu, SiluAndMul.forward_cpu) == (vllm_cpu_layers.rms_norm, vllm_cpu_layers.silu_and_mul)


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_layers_keep_their_slices_in_one_storage(platform, kind):
    register()
    layer = SimpleNamespace()
    kind.create_lora_weights(layer)
    assert [one.shape for one in layer.lora_a_stacked] == [(SLOTS, 1, RANK, INPUT)] * 3
    assert [one.shape[2] for one in layer.lora_b_stacked] == list(WIDTHS)
    assert {one.dtype for one in layer.lora_a_stacked} == {torch.bfloat16}
    for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
        assert {one.untyped_storage().data_ptr() for one in stacked} == {stacked.whole.untyped_storage().data_ptr()}
    layer.lora_b_stacked[1][2] = 1.0
    assert layer.lora_b_stacked.whole.sum() == WIDTHS[1] * RANK  # nothing else was touched


@pytest.mark.parametrize(("switch", "version"), [("1", "0.32.0"), ("0", "0.32.0"), ("1", "9.9.9")])
def test_layers_that_were_packed_away_are_on_the_cpu_with_and_without_our_kernels(platform, monkeypatch, switch, version):
    monkeypatch.setenv(vllm_cpu.SWITCH, switch)
    monkeypatch.setattr(vllm_cpu.vllm, "__version__", version)
    register()
    layer = torch.nn.Linear(2, 2)
    assert utils._get_lora_device(layer) == base_linear._get_lora_device(layer) == layer.weight.device
    layer.weight = None
    assert utils._get_lora_device(layer) == base_linear._get_lora_device(layer) == torch.device("cpu")


def test_a_vllm_without_that_function_is_left_alone(platform, monkeypatch):
    monkeypatch.setenv(vllm_cpu.SWITCH, "0")
    monkeypatch.delattr(utils, "_get_lora_device")
    register()
    assert not hasattr(utils, "_get_lora_device")


def test_the_switch_leaves_vllm_s_kernels_alone(platform, monkeypatch):
    monkeypatch.setenv(vllm_cpu.SWITCH, "0")
    register()
    assert platform.get_punica_wrapper() == "vllm's own"
    assert RMSNorm.forward_cpu is SiluAndMul.forward_cpu is own_forward


def test_other_platforms_are_left_alone(platform, monkeypatch):
    monkeypatch.setattr(type(platform), "is_cpu", lambda _: False)
    register()
    assert platform.get_punica_wrapper() == "vllm's own"
    assert utils._get_lora_device is own_device


def test_an_untested_vllm_is_left_alone_and_said(platform, monkeypatch, caplog):
    monkeypatch.setattr(vllm_cpu.vllm, "__version__", "9.9.9")
    monkeypatch.setattr(vllm_cpu.log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=vllm_cpu.log.name):
        vllm_cpu.log.addHandler(caplog.handler)
        register()
        vllm_cpu.log.removeHandler(caplog.handler)
    assert platform.get_punica_wrapper() == "vllm's own"
    assert "9.9.9" in caplog.text
