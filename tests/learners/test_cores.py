"""Who computes on this machine is known to others, and forgotten with its process."""

import multiprocessing
import os
import signal
import tempfile
import time

import pytest

from learners import cores


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Not the lock of real jobs on this machine; children find the same one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def hold(ready):
    with cores.wanted():
        ready.set()
        time.sleep(60)


def test_cores_are_wanted_while_anybody_computes():
    assert not cores.are_wanted()
    with cores.wanted():
        with cores.wanted():
            assert cores.are_wanted()
        assert cores.are_wanted()
    assert not cores.are_wanted()


def test_a_job_that_is_killed_wants_nothing_any_more():
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    job = spawn.Process(target=hold, args=(ready,))
    job.start()
    assert ready.wait(60)
    assert cores.are_wanted()
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    assert not cores.are_wanted()


def test_where_nobody_can_be_told_a_job_computes_all_the_same(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with cores.wanted():
        assert not cores.are_wanted()
