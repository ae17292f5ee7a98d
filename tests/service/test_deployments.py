"""The daemon's side of what is done on Ray, without a Ray."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from learners.base import BaseModel

with warnings.catch_warnings():  # Ray's own, at its import
    warnings.simplefilter("ignore")
    from service import deployments
from service.errors import BaseUnavailable
from service.settings import Settings

BASE = BaseModel(Path("/bases/tiny-int8"), "tiny", "a", "b", "c")


@pytest.fixture
def steps(monkeypatch):
    """What the task gives, one object after the other."""
    found = []
    monkeypatch.setattr(deployments, "_prepare", SimpleNamespace(remote=lambda *_: iter(found)))
    monkeypatch.setattr(deployments, "ray", SimpleNamespace(get=lambda step: step))
    return found


def test_each_step_of_preparing_is_said_before_the_base_is_there(steps):
    steps += ["int8: layer 1 of 2", "int8: perplexity 10 → 11", BASE, "not asked for"]
    said = []
    assert deployments.prepare(Settings(), said.append) == BASE
    assert said == ["int8: layer 1 of 2", "int8: perplexity 10 → 11"]


def test_a_task_that_ends_without_a_base_is_an_error(steps):
    steps += ["int8: layer 1 of 2"]
    with pytest.raises(BaseUnavailable, match="without a base"):
        deployments.prepare(Settings(), print)
