"""Hypothesis without clocks, since a slow machine is no failure; which of pytest's processes runs what; threads for a test."""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("learnd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("learnd")

THREADS = "OMP_NUM_THREADS"
os.environ.setdefault(THREADS, "1")
"""For all that tests compute, but for daemons: on cores that are shared, each thread of a small product waits for the others."""

WITH_DAEMONS = "tests/end_to_end"


class Apart(LoadScopeScheduling):
    """The tests with whole daemons are one unit of work, since they share one and two would share the cores; else a file is."""

    def _split_scope(self, nodeid):
        return WITH_DAEMONS if nodeid.startswith(WITH_DAEMONS) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config, log):
    return Apart(config, log)


def pytest_collection_modifyitems(items):
    """The longest unit begins first."""
    items.sort(key=lambda item: not item.nodeid.startswith(WITH_DAEMONS))


def pytest_collection_finish():
    """What was imported stays: each learning job collects garbage, and would look through all of vLLM and PyTorch for it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # libraries count what is left when the interpreter ends


@pytest.fixture
def four_threads():
    """PyTorch computes with four threads, and afterwards with as many as before."""
    import torch  # not for those who need none

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
