"""Checkpoints of several processes: equal bits on any number of ranks, and whole whatever happens to one of them."""

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import time
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, start_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastppo.algorithms.ranks import Ranks
from fastppo.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint
from fastppo.training.distributed.processes import Processes
from fastppo.training.optim import load_optimizer, optimizer_tensors, parameter_of_state

pytestmark = pytest.mark.slow


def all_ranks():
    return Processes(torch.device("cpu")) if dist.is_initialized() else Ranks()


def rank():
    return all_ranks().rank


def save(root, step, tensors, state, keep_last=2):
    save_checkpoint(root, step, tensors=tensors, state=state, config={}, keep_last=keep_last, ranks=all_ranks())


def find(root):
    return find_checkpoint(root, ranks=all_ranks())


def fingerprint(tensors):
    """{name: dtype, shape and hash} of whole tensors, the same on every rank."""
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    flat = {name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for name, t in whole.items()}
    return {
        name: (str(whole[name].dtype), tuple(whole[name].shape), hashlib.sha256(flat[name]).hexdigest())
        for name in flat
    }


def names(root):
    return sorted(path.name for path in root.iterdir())


# Models and optimizers


class Run:
    """A tied model, sharded on several ranks, whose odd sizes no number of ranks divides, and its optimizer."""

    def __init__(self, shard=True):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 37, "hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
        # Of three rows over four ranks the last rank has none.
        self.model.scale = torch.nn.Parameter(torch.randn(3, 2))
        if dist.is_initialized() and shard:
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-2, fused=True)
        self.step = 0

    def train(self, steps):
        for _ in range(steps):
            self.step += 1
            tokens = torch.randint(0, 37, (2, 7), generator=torch.Generator().manual_seed(self.step))
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            self.model.scale.grad = self.model.scale.detach().clone()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, root):
        tensors, meta = optimizer_tensors(self.optimizer)
        groups = {"policy": self.parameters, "optimizer": tensors}
        save(root, self.step, groups, {"optimizer": meta}, keep_last=9)

    def load(self, root):
        found = find(root)
        saved = found.tensors("policy", self.parameters.get)
        assert saved.keys() == self.parameters.keys()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
        tensors = found.tensors("optimizer", partial(parameter_of_state, self.optimizer))
        load_optimizer(self.optimizer, tensors, found.state["optimizer"])
        self.step = found.step

    def fingerprint(self):
        return fingerprint({**self.parameters, **optimizer_tensors(self.optimizer)[0]})


def resume_and_save(root, steps, shard=True):
    """Resume if there is a checkpoint, and train and save; returns the state's fingerprints at both ends."""
    run = Run(shard)
    if root.exists():
        run.load(root)
    began = run.fingerprint()
    run.train(steps)
    run.save(root)
    return began, run.fingerprint()


def test_the_same_bits_on_another_number_of_ranks(tmp_path):
    ended = None
    for num_ranks in (2, 1, 4, 2):
        results = run_ranks(num_ranks, resume_and_save, tmp_path / "run", 2)
        assert all(result == results[0] for result in results)
        began, now = results[0]
        assert len(began) == (len(Run(shard=False).parameters) if ended is None else len(ended))
        assert ended in (None, began)
        assert now != began
        ended = now
    files = names(tmp_path / "run" / "step-000006")
    groups = [f"{group}-{each}.safetensors" for group in ("optimizer", "policy") for each in range(4)]
    assert files == sorted([*groups, "config.json", "manifest.json", "state.json"])
    with safe_open(tmp_path / "run" / "step-000006" / "policy-3.safetensors", "pt") as file:
        assert file.get_slice("scale").get_shape() == [0, 2]
    whole = [
        sum(file.stat().st_size for file in (tmp_path / "run" / f"step-{step:06d}").glob("policy*")) for step in (4, 6)
    ]
    assert whole[1] < 2 * whole[0]  # every value is stored once, so only the files' headers are added


def test_the_run_goes_on_to_the_same_bits_on_the_same_number(tmp_path):
    straight = run_ranks(2, resume_and_save, tmp_path / "straight", 4)
    for _ in range(2):
        stopped = run_ranks(2, resume_and_save, tmp_path / "stopped", 2)
    assert stopped[0][1] == straight[0][1]
    manifests = [(tmp_path / run / "step-000004" / "manifest.json").read_bytes() for run in ("straight", "stopped")]
    assert manifests[0] == manifests[1]


def test_replicated_tensors_are_written_once(tmp_path):
    results = run_ranks(2, resume_and_save, tmp_path / "run", 2, False)
    resumed = run_ranks(1, resume_and_save, tmp_path / "run", 2)
    assert results[0] == results[1]
    assert resumed[0][0] == results[0][1]
    for group in ("policy", "optimizer"):
        first, second = (load_file(tmp_path / "run" / "step-000002" / f"{group}-{each}.safetensors") for each in (0, 1))
        assert first
        assert second
        assert not first.keys() & second.keys()


# Tensors of every kind


def build_tensors():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (10, 3), dtype=torch.int32, generator=generator)
    return {
        "any bits": bits.view(torch.float32),
        "bf16": torch.randn(5, 7, generator=generator).bfloat16(),
        "fp8": torch.randn(9, 2, generator=generator).to(torch.float8_e4m3fn),
        "integers": torch.randint(0, 2**62, (3,), generator=generator),
        "bool": torch.rand(2, 5, 3, generator=generator) > 0.5,
        "one": torch.randn(1, 4, generator=generator),
        "none": torch.empty(0, 3),
        "0-dim": torch.randn((), generator=generator),
        "plain": torch.randn(4, 4, generator=generator),
    }


def place(tensors, dim):
    """Sharded over `dim` where there are several ranks and so many dimensions; one replicated, and one no DTensor."""
    if not dist.is_initialized():
        return tensors
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {name: DTensor.from_local(tensor, mesh, [Replicate()]) for name, tensor in tensors.items()}
    placed = {
        name: tensor.redistribute(placements=[Shard(dim) if tensor.ndim > dim else Replicate()])
        for name, tensor in whole.items()
    }
    return placed | {"plain": tensors["plain"]}


def save_tensors(root, dim):
    own = {f"rank {rank()}": torch.tensor([rank()])}
    groups = {"policy": place(build_tensors(), dim), "own": own, "empty": {}}
    save(root, 1, groups, {"rank": rank()})


def load_tensors(root, dim):
    found, target = find(root), place(build_tensors(), dim)
    loaded = found.tensors("policy", target.get)
    assert [name for name in target if isinstance(loaded[name], DTensor) != isinstance(target[name], DTensor)] == []
    local = [{name: getattr(t, "_local_tensor", t) for name, t in each.items()} for each in (loaded, target)]
    assert fingerprint(local[0]) == fingerprint(local[1])
    return sorted(found.tensors("own")), found.tensors("empty"), found.state


def test_tensors_of_every_kind(tmp_path):
    for num_ranks, dim in ((4, 0), (2, 1), (1, 0)):
        root = tmp_path / f"{num_ranks}"
        run_ranks(num_ranks, save_tensors, root, dim)
        own = [f"rank {each}" for each in range(num_ranks)]
        for others, other_dim in ((3, 1), (1, 0), (2, 0)):
            for result in run_ranks(others, load_tensors, root, other_dim):
                assert result == (own, {}, {"rank": 0})


# Damage and errors


def save_small(root, step, size=1001):
    tensors = {"policy": place({"weight": torch.full((size, 3), float(step)), "plain": torch.zeros(2)}, 0)}
    save(root, step, tensors, {"step": step})


def find_small(root):
    """The found step, the warnings of it, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = find(root)
            weight = found.tensors("policy", place({"weight": torch.empty(1001, 3), "plain": torch.zeros(2)}, 0).get)
            assert (weight["weight"] == found.step).full_tensor().all()
            result = found.step
        except CheckpointError as error:
            result = str(error)
    return result, [str(warning.message) for warning in caught if "damaged" in str(warning.message)]


def test_damage_of_one_rank_s_file_is_found(tmp_path):
    for step in (1, 2):
        run_ranks(2, save_small, tmp_path, step)
    file = tmp_path / "step-000002" / "policy-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    first, second = run_ranks(2, find_small, tmp_path)
    assert first[0] == second[0] == 1
    assert len(first[1]) == 1
    assert "policy-1.safetensors has changed since it was written" in first[1][0]
    assert second[1] == []
    (tmp_path / "step-000001" / "policy-0.safetensors").unlink()
    for results in (run_ranks(2, find_small, tmp_path), run_ranks(3, find_small, tmp_path)):
        for result, warned in results:
            assert "no checkpoint can be used; the newest: " in result
            assert "step-000002: policy-1.safetensors has changed" in result
            assert warned == []


def test_a_part_that_is_missing_inside_a_sound_file_is_named(tmp_path):
    run_ranks(3, save_small, tmp_path, 1)
    path = tmp_path / "step-000001"
    with safe_open(path / "policy-1.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({}, path / "policy-1.safetensors", metadata)
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / "policy-1.safetensors").read_bytes()
    manifest["files"]["policy-1.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["sha256"]
    text = json.dumps(manifest, indent=1) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=r"policy\.safetensors: the parts of 'weight' do not make a whole"):
        load_checkpoint(path).tensors("policy")


def save_with_a_full_disk(root, full):
    if rank() == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(CheckpointError) as caught:
        save_small(root, 2, 10_001)
    return str(caught.value)


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_full_disk_on_one_rank(tmp_path, full):
    run_ranks(3, save_small, tmp_path, 1)
    for message in run_ranks(3, save_with_a_full_disk, tmp_path, full):
        assert "step 2 could not be saved: " in message
        assert f"policy-{full}.safetensors" in message
        assert message.endswith("Older checkpoints are untouched")
    assert names(tmp_path) == ["step-000001"]
    assert run_ranks(2, find_small, tmp_path) == [(1, []), (1, [])]


def save_what_json_cannot_hold(root):
    state = {"bad": {1: 2}} if rank() == 0 else {}
    with pytest.raises(TypeError, match=r"state\.bad: the key 1 is a int"):
        save(root, 1, {}, state)


def test_a_bad_value_is_named_on_every_rank(tmp_path):
    run_ranks(2, save_what_json_cannot_hold, tmp_path)
    assert names(tmp_path) == []


def save_on(root):
    found = find(root)
    for step in itertools.count(found.step + 1 if found else 1):
        save_small(root, step)
        (root.parent / f"saved by {rank()}").write_text(f"{step}")


def test_ranks_killed_at_random_moments(tmp_path):
    root, draw = tmp_path / "root", random.Random(5)
    saved = 0
    for trial in range(8):
        processes = [process for process, _ in start_ranks(2, save_on, root)]
        deadline = time.monotonic() + 30
        while not (tmp_path / "saved by 1").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        for process in ([processes[0]], [processes[1]], processes)[trial % 3]:
            process.kill()
        for process in processes:  # the other one ends by itself, since its group has lost a rank
            process.join(timeout=30)
            assert process.exitcode is not None
        reported = int((tmp_path / "saved by 1").read_text())
        (tmp_path / "saved by 1").unlink()
        found = find_checkpoint(root)
        assert found.step >= max(saved, reported)
        assert (found.tensors("policy")["weight"] == found.step).all()
        saved = found.step
    assert saved >= 8
    left = [name for name in os.listdir(root) if not name.startswith(("step-", ".saving-", ".trash-"))]
    assert left == []
    shutil.rmtree(root)
