"""Two workers on this CPU that share the model out among them (FSDP over gloo) make the adapter that one makes."""

import json
import os
import socket
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from learners import artifact, job, servable, sharding, trainer
from replay.records import Split
from tests.learners.test_job import FIRST, prepared

SPAWN = get_context("spawn")
"""Not forked: a fork would inherit the threads, and the lone worker's state, that earlier tests' jobs left in this process."""
FEW = [e for e in FIRST if e.split is Split.TRAIN][:8] + [e for e in FIRST if e.split is Split.HOLDOUT][:2]
PLAIN = {"strategy": "naive", "epochs": 1, "accumulation": 1}


def work(rank, folder, port):
    """A worker, with the variables that Ray Train or torchrun sets."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    save = trainer._Trainer.save_model

    def checked(self, *arguments, **named):
        assert all(isinstance(p, DTensor) for p in self.model.parameters()), "nobody shared anything"
        save(self, *arguments, **named)

    trainer._Trainer.save_model = checked
    job.run(folder, is_main=rank == 0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_fsdp_over_two_workers_ends_in_the_same_adapter(base, tmp_path):
    shared = prepared(tmp_path / "shared", base, examples=FEW, batch_size=2, **PLAIN)
    spec = json.loads((shared / "spec.json").read_text())
    (shared / "spec.json").write_text(json.dumps({**spec, "trainer": {"fsdp": {"version": 2}}}))
    port = free_port()
    workers = [SPAWN.Process(target=work, args=(rank, shared, port)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    artifact.check(shared / "artifact", base, 4)
    alone = prepared(tmp_path / "alone", base, examples=FEW, batch_size=4, **PLAIN)
    job.run(alone)
    found, wanted = (load_file(folder / "artifact" / servable.WEIGHTS) for folder in (shared, alone))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.allclose(found[name], weight, atol=1e-3), name
    scores = [json.loads((folder / "evaluation.json").read_text())["slices"]["planes"] for folder in (shared, alone)]
    assert scores[0]["candidate"]["loglik"] == pytest.approx(scores[1]["candidate"]["loglik"], abs=0.05)
    assert scores[0]["candidate"]["loglik"] != pytest.approx(scores[0]["champion"]["loglik"], abs=0.05)


def test_deepspeed_s_file_or_fsdp_s_options_are_what_the_trainer_is_given():
    off = {"deepspeed": None, "fsdp": {}}
    assert sharding.arguments(off) == {}
    assert not sharding.is_sharded(off)
    assert sharding.arguments({**off, "deepspeed": "/etc/zero2.json"}) == {"deepspeed": "/etc/zero2.json"}
    assert sharding.arguments({**off, "fsdp": {"version": 2}}) == {"fsdp": True, "fsdp_config": {"version": 2}}
    assert sharding.is_sharded({**off, "deepspeed": "/etc/zero2.json"})
