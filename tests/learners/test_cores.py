"""Who computes on this machine is known to others, and forgotten with its process."""

import fcntl
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


@pytest.mark.parametrize("call", ["fcntl", "flock"])
def test_looks_at_the_same_moment_do_not_take_each_other_for_a_job(monkeypatch, call):
    ask, found = getattr(fcntl, call), []

    def another_looks_meanwhile(*arguments):
        told = ask(*arguments)
        if not found:
            found.append("looking")
            found.append(cores.are_wanted())  # while the first look still has its file open, and what it may hold of it
        return told

    cores._lock().touch()
    monkeypatch.setattr(fcntl, call, another_looks_meanwhile)
    assert not cores.are_wanted()
    assert found in ([], ["looking", False])


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
