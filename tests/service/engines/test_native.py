"""The compiled kernel against each row by itself, and what happens where it cannot be compiled."""

import logging
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engines import native

SCALE = 0.5


def one_by_one(x, y, a, b, widths, slots):
    """Each row in fp64, each slice by itself."""
    rank, out = b.shape[1], y.double().clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            hidden = (a[slot].double() @ x[row].double()).split(rank)
            parts = [h @ part for h, part in zip(hidden, b[slot].double().split(widths, dim=1), strict=True)]
            out[row] += SCALE * torch.cat(parts)
    return out


def drawn(rows, inputs, rank, widths, dtype, slots=5):
    draw = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (rows, sum(widths)), (slots, len(widths) * rank, inputs), (slots, rank, sum(widths))
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


@pytest.fixture(scope="module")
def kernel():
    found = native.load()
    assert found, "this machine has no C++ compiler: the kernel cannot be tested"
    return found


@settings(max_examples=200, deadline=None)
@given(
    slots=st.lists(st.integers(-1, 4), min_size=1, max_size=40),
    inputs=st.integers(1, 70),
    rank=st.integers(1, 20),
    widths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_equals_each_row_by_itself(kernel, slots, inputs, rank, widths, dtype):
    x, y, a, b = drawn(len(slots), inputs, rank, widths, dtype)
    want = one_by_one(x, y, a, b, widths, slots)
    kernel.add(native.Layer(a, b, widths), x, y, native.Rows.of(torch.tensor(slots)), SCALE)
    # fp32 sums; then one rounding to bf16, by half a unit in 256
    close = {"rtol": 2**-8, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(y.double(), want, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_s_rows_over_wide_slices(kernel, dtype):
    """More outputs than are taken together, inputs of whole steps, whose rows are read where they lie."""
    widths = [1100, 70]
    x, y, a, b = drawn(75, 128, 16, widths, dtype)
    slots = [0] * 37 + [-1] + [2] * 37
    want = one_by_one(x, y, a, b, widths, slots)
    kernel.add(native.Layer(a, b, widths), x, y, native.Rows.of(torch.tensor(slots)), SCALE)
    close = {"rtol": 2**-8, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(y.double(), want, **close)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_threads_are_no_part_of_the_result(kernel, threads, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: threads)
    x, y, a, b = drawn(9, 1024, 16, [512, 256], torch.float32)
    slots = [0, 1, -1, 2, 2, 2, 2, 2, 0]
    want = one_by_one(x, y, a, b, [512, 256], slots)
    kernel.add(native.Layer(a, b, [512, 256]), x, y, native.Rows.of(torch.tensor(slots)), SCALE)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-3)


def test_bfloat16_is_rounded_to_the_nearest_and_what_is_no_number_stays_none(kernel):
    """As PyTorch does it, ties and the largest ones too; cutting the lower half off would be told apart."""
    values = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3895e38, float("inf"), float("nan"), 1e-40])
    a, b = torch.ones(1, 1, 1).bfloat16(), torch.ones(1, 1, 1).bfloat16()
    kept = []
    for value in values:  # y = high + low, whose sum in fp32 is the value
        high = value.bfloat16()
        low = (value - high.float()).bfloat16()
        y = high.reshape(1, 1).clone()
        kernel.add(native.Layer(a, b, [1]), low.reshape(1, 1), y, native.Rows.of(torch.tensor([0])), 1.0)
        kept.append(y[0, 0])
        cut = (value.view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert value != values[1] or cut.bfloat16() != value.bfloat16()
    want = values.bfloat16()
    want[4] = float("nan")  # ∞ − ∞
    torch.testing.assert_close(torch.stack(kept), want, rtol=0, atol=0, equal_nan=True)


def test_another_source_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv("LEARND_CACHE", str(tmp_path))
    compiler = shutil.which("c++")
    first = native.compiled(compiler, native.SOURCE)
    assert native.compiled(compiler, native.SOURCE) == first
    source = tmp_path / "lora.cpp"
    source.write_text(native.SOURCE.read_text() + "\n// another\n")
    monkeypatch.setattr(native, "SOURCE", source)
    assert native.compiled(compiler, native.SOURCE) != first
    assert len(list((tmp_path / "kernels").iterdir())) == len(
        {first, native.compiled(compiler, native.SOURCE)}
    )  # and nothing half made


@pytest.mark.parametrize("broken", ["no compiler", "an error in the source", "a compiler that fails"])
def test_where_it_cannot_be_compiled_that_is_said(broken, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LEARND_CACHE", str(tmp_path))
    if broken == "no compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
    elif broken == "a compiler that fails":
        monkeypatch.setenv("CXX", "false")
    else:
        monkeypatch.setattr(native, "SOURCE", tmp_path / "lora.cpp")
        native.SOURCE.write_text("int main( {")
    monkeypatch.setattr(native.log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=native.log.name):
        assert native.load.__wrapped__() is None
    assert "slower" in caplog.text


def test_threads_that_sleep_are_left_asleep(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert native.threads() == torch.get_num_threads()
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert native.threads() == 1
