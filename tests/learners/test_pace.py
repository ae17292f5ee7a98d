"""Threads of a job: given back while others want the cores, taken again after."""

import multiprocessing
import os
import time
from itertools import pairwise

import pytest
import torch

from learners import pace
from learners.pace import MOST_PATIENCE, Pace

SECOND = 10**9


def passes(shares, every=pace.SECONDS):
    """Threads after each forward pass, when the thread waited for such shares of the time between them."""
    now, times, found = [0.0], [[0, 0]], []
    module = torch.nn.Linear(1, 1)
    pace.follow(module, look=lambda: tuple(times[0]), clock=lambda: now[0])
    for share in shares:
        now[0] += every
        times[0] = [times[0][0] + int((1 - share) * SECOND), times[0][1] + int(share * SECOND)]
        module(torch.ones(1, 1))
        found.append(torch.get_num_threads())
    return found


@pytest.mark.usefixtures("four_threads")
def test_threads_are_halved_where_the_cores_are_crowded_and_come_back_one_by_one():
    assert passes([0.0, 0.5, 0.9, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]) == [4, 2, 1, 1, 1, 1, 1, 2, 2]


def test_where_one_more_was_too_many_it_is_tried_later_each_time():
    pace, threads = Pace(2), []
    for _ in range(200):
        threads.append(pace.after(0.5 if threads and threads[-1] == 2 else 0.0))
    tried = [n for n, (before, after) in enumerate(pairwise(threads)) if (before, after) == (1, 2)]
    waits = [after - before for before, after in pairwise(tried)]
    assert waits == sorted(waits)
    assert waits[-1] >= MOST_PATIENCE


@pytest.mark.usefixtures("four_threads")
def test_it_does_not_look_at_each_pass():
    assert passes([0.9, 0.9, 0.9], every=pace.SECONDS / 2) == [4, 2, 2]


@pytest.mark.usefixtures("four_threads")
def test_where_nobody_counts_the_threads_stay():
    module = torch.nn.Linear(1, 1)
    pace.follow(module, look=lambda: None, clock=iter(range(0, 1000, 100)).__next__)
    module(torch.ones(1, 1))
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or pace.times() is None, reason="Linux counts it")
def test_a_thread_that_shares_its_core_is_seen_to_wait_for_it():
    core = min(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    other = spawn.Process(target=burn, args=(core,), daemon=True)
    other.start()
    job = spawn.Process(target=work, args=(core, results), daemon=True)
    job.start()
    try:
        assert results.get(timeout=120) > pace.CROWDED
    finally:
        other.kill()
        other.join()
        job.join()


def work(core, results):
    time.sleep(2)  # the other process has begun
    os.sched_setaffinity(0, {core})
    before, until = pace.times(), time.monotonic() + 1
    while time.monotonic() < until:
        pass
    ran, waited = (after - was for after, was in zip(pace.times(), before, strict=True))
    results.put(waited / (ran + waited))


def burn(core):
    os.sched_setaffinity(0, {core})
    while True:
        pass
