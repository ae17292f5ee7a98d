import torch

from learners import precision


def test_the_faster_one_is_chosen(monkeypatch):
    for kind, seconds in (
        ("bfloat16", {torch.bfloat16: 1.0, torch.float32: 2.0}),
        ("float32", {torch.bfloat16: 2.0, torch.float32: 1.0}),
    ):
        monkeypatch.setattr(precision, "product_seconds", seconds.get)
        assert precision.fastest() == kind


def test_it_is_measured():
    assert 0 < precision.product_seconds(torch.float32) < 10
