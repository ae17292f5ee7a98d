import pytest
import torch

from learners import precision


@pytest.fixture
def machine(monkeypatch):
    """A CPU with such flags, on which products of bf16 and fp32 take so long."""

    def made(flags, halves, singles):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        monkeypatch.setattr(precision, "product_seconds", lambda *_: [halves, singles])

    return made


@pytest.mark.parametrize(("halves", "singles", "kind"), [(1.0, 2.0, "bfloat16"), (2.0, 1.0, "float32")])
def test_without_flags_the_faster_one_is_chosen(machine, halves, singles, kind):
    machine({"avx512_f": True, "avx512_bf16": False}, halves, singles)
    assert precision.fastest() == kind


@pytest.mark.parametrize("flag", precision.IN_HARDWARE)
def test_a_crowded_machine_is_no_other_processor(machine, flag):
    """A product that had to wait for its core says nothing of it."""
    machine({flag: True}, 2.0, 1.0)
    assert precision.fastest() == "bfloat16"


def test_it_is_measured():
    assert all(0 < seconds < 10 for seconds in precision.product_seconds(torch.bfloat16, torch.float32))
