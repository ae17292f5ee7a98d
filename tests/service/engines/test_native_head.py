"""The head's kernel against products in fp64, and its rows against those that it was made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.quantize import fake_int8
from service.engines import native, native_head

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""What a logit may be off by as a share of itself, by its own rounding."""
STEPS = 127 * 254
"""Of each input, to the largest one of its row: it may be off by half a step."""


@pytest.fixture(scope="module")
def library():
    found = native_head.load()
    if found is None:
        pytest.skip("this machine has no AMX, or no compiler: embeddings are dequantized, as test_vllm_rows.py has it")
    return found


def drawn(vocabulary, inputs):
    draw = torch.Generator().manual_seed(vocabulary + inputs)
    integers = torch.randint(-128, 128, (vocabulary, inputs), generator=draw).to(torch.int8)
    return integers, torch.rand(vocabulary, 1, generator=draw) + 0.5


def inputs_of(count, width, dtype):
    """Some inputs far larger than the rest, as a model's are."""
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(count)) * torch.linspace(0.01, 3, width) ** 3).to(
        dtype
    )


def expected(x, integers, scale):
    """In fp64, and what rounding each input by half a step may change."""
    weight = integers.double() * scale.double()
    return x.double() @ weight.t(), x.double().abs().amax(-1, keepdim=True) / STEPS / 2 * weight.abs().sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), blocks=st.integers(1, 5), inputs=st.integers(1, 200))
def test_logits_are_the_product(library, dtype, count, blocks, inputs):
    integers, scale = drawn(64 * blocks, inputs)
    x = inputs_of(count, inputs, dtype)
    want, rounding = expected(x, integers, scale)
    found = native_head.Rows(library, integers, scale, dtype).logits(x)
    assert found.dtype == dtype
    assert found.shape == want.shape
    assert ((found.double() - want).abs() <= 1.01 * rounding + DTYPES[dtype] * want.abs() + 1e-6).all()


def test_inputs_rounded_to_eight_bits_would_be_told_apart(library):
    """The control: what W8A8 makes of the same inputs is ten times further off."""
    integers, scale = drawn(128, 96)
    x = inputs_of(8, 96, torch.float32)
    want, _ = expected(x, integers, scale)
    off = [
        (found.double() - want).norm()
        for found in (
            native_head.Rows(library, integers, scale, torch.float32).logits(x),
            expected(fake_int8(x), integers, scale)[0],
        )
    ]
    assert 10 * off[0] < off[1]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(1, 5), inputs=st.integers(1, 200), count=st.integers(0, 150))
def test_rows_are_the_matrix_s_own(library, dtype, blocks, inputs, count):
    integers, scale = drawn(64 * blocks, inputs)
    ids = torch.randint(0, 64 * blocks, (count,), generator=torch.Generator().manual_seed(count))
    want = (integers.float() * scale)[ids].to(dtype)
    assert torch.equal(native_head.Rows(library, integers, scale, dtype).rows(ids), want)


def test_ids_may_have_any_shape_and_lie_anywhere(library):
    integers, scale = drawn(64, 40)
    rows = native_head.Rows(library, integers, scale, torch.float32)
    ids = torch.tensor([[3, 63], [0, 17], [5, 5]]).t()
    assert torch.equal(rows.rows(ids), (integers.float() * scale)[ids])
    assert rows.rows(torch.tensor([64, -1])).count_nonzero() == 0, "nothing is read from beyond"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_are_no_part_of_the_result(library, threads):
    integers, scale = drawn(640, 64)
    x, rows = inputs_of(9, 64, torch.bfloat16), native_head.Rows(library, integers, scale, torch.bfloat16)
    once = rows.logits(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(rows.logits(x), once)
    finally:
        torch.set_num_threads(1)


def test_what_is_no_number_spoils_its_own_row_only(library):
    integers, scale = drawn(64, 70)
    x = inputs_of(3, 70, torch.float32)
    x[0, 69], x[2, 1] = float("nan"), float("inf")
    found = native_head.Rows(library, integers, scale, torch.float32).logits(x)
    assert found[[0, 2]].isnan().all()
    assert found[1].isfinite().all()
    assert native_head.Rows(library, integers, scale, torch.float32).logits(torch.zeros(1, 70)).count_nonzero() == 0


def test_other_products_on_tiles_stay_right_beside_it(library):
    """PyTorch's own bf16 products configure the same tiles."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=draw).bfloat16() for _ in range(2))
    rows, before = native_head.Rows(library, *drawn(64, 64), torch.bfloat16), a @ b
    for _ in range(3):
        rows.logits(a)
        assert torch.equal(a @ b, before)


def test_a_part_of_a_block_is_refused(library):
    with pytest.raises(ValueError, match="65 rows"):
        native_head.Rows(library, *drawn(65, 64), torch.float32)


def test_what_the_kernel_would_misread_is_converted_or_refused(library):
    integers, scale = drawn(64, 40)
    rows, x = native_head.Rows(library, integers, scale, torch.float32), inputs_of(2, 80, torch.bfloat16)
    with pytest.raises(ValueError, match="not rows of 40"):
        rows.logits(x)
    assert torch.equal(rows.logits(x[:, ::2]), rows.logits(x[:, ::2].float().contiguous()))
    assert torch.equal(rows.rows(torch.tensor([3, 4], dtype=torch.int32)), rows.rows(torch.tensor([3, 4])))


def test_each_row_is_kept_once(library):
    integers, scale = drawn(128, 128)
    assert native_head.Rows(library, integers, scale, torch.bfloat16).packed.nbytes == integers.nbytes


@pytest.mark.parametrize("missing", ["AMX", "a compiler"])
def test_where_it_cannot_run_there_is_none(missing, monkeypatch):
    if missing == "AMX":
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    else:
        monkeypatch.setattr(native, "loaded", lambda _: None)
    assert native_head.load.__wrapped__() is None
