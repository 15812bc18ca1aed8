"""Checkpoints made by hand, with valid hashes and nonsense inside, end in one line that names the file and the key."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import build_changed_config, make_tiny_model

from fastppo.training import checkpoint as module
from fastppo.training.checkpoint import CheckpointError
from fastppo.training.trainer import Trainer

REWARD = "def vowels(completions, **_):\n    return [float(sum(c in 'aeiou' for c in t)) for t in completions]\n"


def config(folder, **changes):
    tree = {
        "output_dir": str(folder / "run"),
        "total_steps": 1,
        "report_to": "none",
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "prompts.txt"), "eval_size": 0},
        "rewards": [
            {"name": "vowels", "function": f"{folder / 'reward.py'}:vowels", "normalize": True},
            {"name": "bound", "function": f"{folder / 'reward.py'}:vowels", "threshold": 0.5},
        ],
        "rollout": {"num_prompts": 2, "num_generations": 1, "max_new_tokens": 2},
        "ppo": {"num_ppo_epochs": 1, "kl_controller": "adaptive"},
        "checkpoint": {"every": 1},
        "watch": {"rules": [{"metric": "kl/reference", "above": 5.0, "action": "rollback"}]},
    }
    return build_changed_config(tree, changes)


@pytest.fixture(scope="module")
def world(no_report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model", hidden_size=8, layers=1)
    (folder / "prompts.txt").write_text("One\nTwo\nThree\n")
    (folder / "reward.py").write_text(REWARD)
    Trainer(config(folder)).train()
    checkpoints = folder / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000000", "step-000001"]
    shutil.rmtree(checkpoints / "step-000000")
    shutil.copytree(checkpoints / "step-000001", folder / "sound")
    return folder


def seal(path):
    """Hash what is there as if it had been saved so."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        if (path / name).is_file():
            manifest["files"][name] = module._size_and_hash(path / name)
    reseal(path, manifest)


def reseal(path, manifest):
    manifest.pop("sha256", None)
    text = json.dumps(manifest, indent=1) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def in_json(name, dotted, value):
    """Set a key of a JSON file; `...` as the value deletes it."""

    def change(path):
        tree = node = json.loads((path / name).read_text())
        *parents, last = dotted.split(".")
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        if value is ...:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
        (path / name).write_text(json.dumps(tree))
        seal(path)

    return change


def in_manifest(change):
    def apply(path):
        manifest = json.loads((path / "manifest.json").read_text())
        reseal(path, change(manifest) or manifest)

    return apply


def in_tensors(group, change, tied=None, offsets=None):
    def apply(path):
        with safe_open(path / f"{group}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata())
        change(tensors)
        metadata |= {name: text for name, text in (("tied", tied), ("offsets", offsets)) if text is not None}
        save_file(tensors, path / f"{group}.safetensors", metadata)
        seal(path)

    return apply


def at(offset):
    return in_tensors("policy", lambda tensors: None, offsets=offset if "{" in offset else f'{{"{EMBED}": {offset}}}')


def replaced(name, data):
    def apply(path):
        (path / name).write_bytes(data)
        seal(path)

    return apply


def state(dotted, value):
    return in_json("state.json", dotted, value)


def file_entry(name, entry):
    return in_manifest(lambda manifest: manifest["files"].update({name: entry}))


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


EMBED = "model.embed_tokens.weight"
ENTRY = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
RULE = "metric=kl/reference above=5.0 below=None relative=False patience=1 action=rollback"

# name: (change, what the message has to name)
MUTATIONS = {
    # The manifest
    "manifest is a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "manifest is deep": (lambda path: (path / "manifest.json").write_bytes(DEEP), "manifest.json is damaged"),
    "no format": (in_manifest(lambda m: m.pop("format") and None), "manifest.json: lacks 'format'"),
    "format is a list": (in_manifest(lambda m: m | {"format": [1] * 999}), "manifest.json: "),
    "version is text": (in_manifest(lambda m: m | {"version": "1"}), "manifest.json: fastppo-checkpoint version '1'"),
    "no step": (in_manifest(lambda m: m.pop("step") and None), "manifest.json: step"),
    "step is text": (in_manifest(lambda m: m | {"step": "1"}), "manifest.json: step"),
    "step is true": (in_manifest(lambda m: m | {"step": True}), "manifest.json: step"),
    "step is negative": (in_manifest(lambda m: m | {"step": -1}), "manifest.json: step"),
    "step is huge": (in_manifest(lambda m: m | {"step": 10**40}), "manifest.json: step"),
    "step is another": (in_manifest(lambda m: m | {"step": 7}), "manifest.json: step"),
    "no files": (in_manifest(lambda m: m | {"files": {}}), "manifest.json: files: lacks 'config.json'"),
    "files is a list": (in_manifest(lambda m: m | {"files": list(m["files"])}), "manifest.json: files"),
    "files is null": (in_manifest(lambda m: m | {"files": None}), "manifest.json: files"),
    "file out of the folder": (file_entry("../../config.yaml", ENTRY), "manifest.json: files.../../config.yaml"),
    "absolute file": (file_entry("/etc/passwd", ENTRY), "manifest.json: files./etc/passwd"),
    "parent as a file": (file_entry("..", ENTRY), "manifest.json: files..."),
    "NUL in a name": (file_entry("a\0b", ENTRY), "manifest.json: files.a"),
    "long name": (file_entry("a" * 3000, ENTRY), "manifest.json: files.a"),
    "file that is missing": (file_entry("more.safetensors", ENTRY), "more.safetensors is missing"),
    "size is text": (file_entry("state.json", ENTRY | {"size": "0"}), "manifest.json: files.state.json.size"),
    "size is huge": (file_entry("state.json", ENTRY | {"size": 10**30}), "manifest.json: files.state.json.size"),
    "no sha256": (file_entry("state.json", {"size": 0}), "manifest.json: files.state.json.sha256"),
    "sha256 is a number": (file_entry("state.json", ENTRY | {"sha256": 1}), "manifest.json: files.state.json.sha256"),
    "entry is null": (file_entry("state.json", None), "manifest.json: files.state.json"),
    "group is not listed": (in_manifest(lambda m: m["files"].pop("policy.safetensors") and None), "policy.safetensors"),
    # State and configuration
    "state is a list": (replaced("state.json", b"[1, 2]"), "state.json: expected an object"),
    "state is no JSON": (replaced("state.json", b"{"), "state.json: "),
    "state is empty": (replaced("state.json", b""), "state.json: "),
    "state is no text": (replaced("state.json", b"\xff\xfe\xff"), "state.json: "),
    "state is deep": (replaced("state.json", DEEP), "state.json: "),
    "state has a number without end": (replaced("state.json", b'{"a": ' + b"9" * 10**5 + b"}"), "state.json: "),
    "config is a number": (replaced("config.json", b"7"), "config.json: expected an object"),
    "config is deep": (replaced("config.json", DEEP), "config.json: "),
    "config of another run": (in_json("config.json", "seed", "x" * 10**5), "configuration differs"),
    "config has text for rewards": (in_json("config.json", "rewards", "x"), "configuration differs"),
    **{f"no {key}": (state(key, ...), f"lacks {key!r}") for key in ("sampler", "algorithm", "rewards", "scheduler")},
    **{f"no {key}": (state(key, ...), f"lacks {key!r}") for key in ("watch", "optimizer", "rng")},
    **{f"{key} is text": (state(key, "x"), key) for key in ("sampler", "algorithm", "rewards", "scheduler", "watch")},
    **{f"{key} is null": (state(key, None), key) for key in ("optimizer", "rng", "sampler", "rewards", "watch")},
    "position is text": (state("sampler.position", "1"), "state.json: sampler: position"),
    "position is a fraction": (state("sampler.position", 1.5), "state.json: sampler: position"),
    "position is true": (state("sampler.position", True), "state.json: sampler: position"),
    "epoch is huge": (state("sampler.epoch", 10**4000), "state.json: sampler: epoch"),
    "other prompts": (state("sampler.n", 99), "state.json: sampler: the number of training prompts was 99"),
    "KL coefficient is text": (state("algorithm.kl_controller.value", "x"), "algorithm: kl_controller.value"),
    "no KL coefficient": (state("algorithm.kl_controller.value", ...), "algorithm: kl_controller: lacks 'value'"),
    "KL controller is a list": (state("algorithm.kl_controller", []), "algorithm: kl_controller"),
    "count is negative": (state("rewards.normalizers.vowels.count", -4), "rewards: "),
    "deviation is negative": (state("rewards.normalizers.vowels.m2", -4.0), "rewards: "),
    "mean is null": (state("rewards.normalizers.vowels.mean", None), "rewards: normalizers.vowels.mean"),
    "other rewards": (state("rewards.multipliers", {"x": {"value": 1.0}}), "rewards: multipliers: lacks 'bound'"),
    "multiplier is text": (state("rewards.multipliers.bound.value", "x"), "rewards: multipliers.bound.value"),
    "last_epoch is text": (state("scheduler.last_epoch", "2"), "scheduler: last_epoch"),
    "last_epoch is huge": (state("scheduler.last_epoch", 10**400), "scheduler: last_epoch"),
    "last_epoch is negative": (state("scheduler.last_epoch", -(2**62)), "scheduler: last_epoch"),
    "no last_epoch": (state("scheduler.last_epoch", ...), "scheduler: lacks 'last_epoch'"),
    "one base rate": (state("scheduler.base_lrs", [0.1]), "scheduler: base_lrs"),
    "base rate is text": (state("scheduler.base_lrs.0", "x"), "scheduler: base_lrs.0"),
    "rollbacks is text": (state("watch.rollbacks", "x"), "watch: rollbacks"),
    "rollbacks is negative": (state("watch.rollbacks", -1), "watch: rollbacks"),
    "rate scale is 0": (state("watch.lr_scale", 0.0), "watch: lr_scale"),
    "rate scale is infinite": (state("watch.lr_scale", math.inf), "watch: lr_scale"),
    "alarm lacks keys": (state("watch.alarms", [{"step": 1}]), "watch: alarms.0.metric"),
    "alarms is text": (state("watch.alarms", "x"), "watch: alarms"),
    "rule's state is a list": (state("watch.rules", {RULE: []}), f"watch: rules.{RULE}"),
    "baseline is text": (state("watch.baselines", {"kl/reference": {"count": "x", "mean": 0}}), "watch: baselines"),
    "optimizer has no shapes": (state("optimizer.shapes", ...), "optimizer: lacks 'shapes'"),
    "optimizer has other shapes": (state("optimizer.shapes", [[[1]]]), "optimizer: "),
    "optimizer's shapes are text": (state("optimizer.shapes", 3), "optimizer: "),
    "no state of the optimizer": (state("optimizer.state_dict", {}), "optimizer: lacks 'param_groups'"),
    "tensor without a name": (state("optimizer.state_dict.state", {"$tensor": []}), "optimizer: "),
    "tensor of another name": (state("optimizer.state_dict.state", {"$tensor": "x"}), "optimizer: lacks 'x'"),
    "dict that is none": (state("optimizer.state_dict.state", {"$dict": 3}), "optimizer: "),
    "groups is a number": (state("optimizer.state_dict.param_groups", 3), "optimizer: param_groups"),
    "one group": (state("optimizer.state_dict.param_groups", [{}]), "optimizer: param_groups"),
    "rate is text": (state("optimizer.state_dict.param_groups.0.lr", "x"), "optimizer: param_groups.0.lr"),
    "no rate": (state("optimizer.state_dict.param_groups.0.lr", ...), "optimizer: param_groups.0: lacks 'lr'"),
    "betas is a number": (state("optimizer.state_dict.param_groups.0.betas", 3), "optimizer: param_groups.0.betas"),
    "rng version is text": (state("rng.python.version", "x"), "rng: "),
    "next gauss is text": (state("rng.python.gauss_next", "x"), "rng: "),
    "numpy of another kind": (state("rng.numpy.bit_generator", "PCG64"), "rng: "),
    "numpy beyond its key": (state("rng.numpy.state.pos", 2**40), "rng: "),
    "no numpy state": (state("rng.numpy.state", ...), "rng: lacks 'state'"),
    # Tensors
    "policy is empty": (replaced("policy.safetensors", b""), "policy.safetensors: "),
    "policy is text": (replaced("policy.safetensors", b"hello" * 99), "policy.safetensors: "),
    "policy's header is huge": (replaced("policy.safetensors", b"\xff" * 16), "policy.safetensors: "),
    "no policy tensor": (in_tensors("policy", lambda t: t.pop(EMBED)), f"policy.safetensors: '{EMBED}' is missing"),
    "one more tensor": (in_tensors("policy", lambda t: t.update(x=torch.ones(1))), "policy.safetensors: 'x' is no"),
    "tensor that broadcasts": (in_tensors("policy", put(EMBED, lambda t: t[:1])), f"policy.safetensors: '{EMBED}'"),
    "transposed tensor": (
        in_tensors("policy", put(EMBED, lambda t: t.t().contiguous())), f"policy.safetensors: '{EMBED}'",
    ),
    "tensor of integers": (in_tensors("policy", put(EMBED, torch.Tensor.int)), f"policy.safetensors: '{EMBED}'"),
    "half tensor": (in_tensors("policy", put(EMBED, torch.Tensor.half)), f"policy.safetensors: '{EMBED}'"),
    "scalar for a critic": (
        in_tensors("value", lambda t: t.update({n: torch.tensor(1.0) for n in t})), "value.safetensors: ",
    ),
    "tied is no JSON": (in_tensors("policy", lambda t: None, "{"), "policy.safetensors: "),
    "tied is a list": (in_tensors("policy", lambda t: None, "[1]"), "policy.safetensors: "),
    "tied to nothing": (in_tensors("policy", lambda t: None, '{"a": "b"}'), "policy.safetensors: lacks 'b'"),
    "tied to a list": (in_tensors("policy", lambda t: None, '{"a": []}'), "policy.safetensors: "),
    "tied and stored": (
        in_tensors("policy", lambda t: None, json.dumps({EMBED: "model.norm.weight"})),
        f"policy.safetensors: '{EMBED}' is stored",
    ),
    "offsets are no JSON": (at("{"), "policy.safetensors: "),
    **{f"offset is {o}": (at(o), "policy.safetensors: ") for o in ('"x"', "null", "[0]", "[0, 0.5]", "[[], 0]")},
    "offset is huge": (at(f"[{2**63}, 0]"), "policy.safetensors: "),
    "offset is large": (at(f"[{2**62}, 0]"), f"policy.safetensors: the parts of '{EMBED}'"),
    "offset is negative": (at("[-1, 0]"), f"policy.safetensors: the parts of '{EMBED}'"),
    "offset leaves a gap": (at("[0, 1]"), f"policy.safetensors: the parts of '{EMBED}'"),
    "moment of another shape": (in_tensors("optimizer", put("state.0.exp_avg", lambda t: t[:1])), "state.0.exp_avg"),
    "moment of integers": (in_tensors("optimizer", put("state.0.exp_avg", torch.Tensor.int)), "state.0.exp_avg"),
    "vector for a step": (in_tensors("optimizer", put("state.1.step", lambda t: t.repeat(9))), "state.1.step"),
    "one more moment": (in_tensors("optimizer", lambda t: t.update(x=torch.ones(1))), "optimizer: "),
    "no moment": (in_tensors("optimizer", lambda t: t.pop("state.0.exp_avg")), "lacks 'state.0.exp_avg'"),
    "short random state": (in_tensors("rng", put("torch", lambda t: t[:9])), "rng: "),
    "random state of floats": (in_tensors("rng", put("torch", torch.Tensor.float)), "rng: "),
    "Python's words are short": (in_tensors("rng", put("python", lambda t: t[:3])), "rng: "),
    "Python's words are negative": (in_tensors("rng", put("python", torch.neg)), "rng: "),
    "no numpy words": (in_tensors("rng", lambda t: t.pop("numpy")), "rng: "),
}  # fmt: skip


@pytest.fixture
def damaged(world):
    path = world / "run" / "checkpoints" / "step-000001"
    shutil.rmtree(path)
    shutil.copytree(world / "sound", path)
    return path


def resume(world):
    with pytest.raises(CheckpointError) as caught:
        Trainer(config(world), resume=True)
    message = str(caught.value)
    assert "step-000001" in message
    assert message.isprintable()
    assert len(message) < 1200
    return message


# Each takes a tenth of a second, so only some are part of the quick tests.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i % 12 else []) for i, n in enumerate(MUTATIONS)]
)
@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_nonsense_ends_in_one_line(world, damaged, name):
    change, named = MUTATIONS[name]
    change(damaged)
    assert named in resume(world)


def test_the_sound_one_is_resumed(world, damaged):
    seal(damaged)
    assert Trainer(config(world), resume=True).step == 1


def test_a_pipe_or_a_folder_in_place_of_a_file_is_not_read(world, damaged):
    (damaged / "state.json").unlink()
    os.mkfifo(damaged / "state.json")
    assert "state.json is missing" in resume(world)
    (damaged / "state.json").unlink()
    (damaged / "state.json").mkdir()
    assert "state.json is missing" in resume(world)
