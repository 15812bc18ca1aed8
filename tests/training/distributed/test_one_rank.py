"""FSDP2 on a single rank, which needs no second process and no second GPU."""

from __future__ import annotations

import socket

import pytest
import torch
from processes import config, make_world
from safetensors.torch import load_file

from fastppo.algorithms.ranks import Ranks

pytestmark = [
    pytest.mark.usefixtures("no_report"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def one_process(monkeypatch):
    """A group of this process alone."""
    from fastppo.training.distributed import connect, disconnect, launch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "world_size", lambda: 2)  # of one process there would be no group
        connect()
    yield
    disconnect()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_sharding_over_one_rank_changes_nothing(tmp_path, one_process, monkeypatch, device, offload):
    from fastppo.training import trainer as module
    from fastppo.training.distributed.sharded import ShardedProcesses

    world, ends = make_world(tmp_path), []
    changes = {
        "device": device,
        "model__value_model": "separate",
        "ppo__kl_in": "loss",
        "ppo__kl_estimator": "exact",
        "ppo__entropy_coef": 0.01,
        "ppo__gradient_accumulation_steps": 2,  # else the update would start with the scored pass
        "data__eval_size": 2,
    }
    for ranks in (Ranks(), ShardedProcesses(torch.device(device), autocast=None, cpu_offload=offload)):
        monkeypatch.setattr(module, "open_ranks", lambda *_, ranks=ranks: ranks)
        out = tmp_path / type(ranks).__name__
        module.Trainer(config(world, out, **changes)).train()
        ends.append({str(path.relative_to(out)): load_file(path) for path in out.glob("final*/*.safetensors")})
    assert len(ends[0]) == 3  # the policy, the critic and its head
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
