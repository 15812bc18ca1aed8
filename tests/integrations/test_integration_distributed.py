"""Two gloo processes: patched models under DDP and FSDP2 against one that sees the whole batch; PPOTrainer under DDP"""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
from tiny import make_tiny_model
from torch import nn

import fastppo

transformers = pytest.importorskip("transformers", reason="the integration is with transformers")
distributed = pytest.importorskip("torch.distributed", reason="this PyTorch has no torch.distributed")


def _model(*, tie: bool, adapters: str | None) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if adapters is not None:
        import peft

        targets = ["q_proj", "lm_head"] if adapters == "head" else ["q_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.double()


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (3, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def _plain_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    picked = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[mask]
    entropy = -(log_p.exp() * log_p).sum(-1)[mask]
    return -picked.mean() + 0.1 * entropy.sum()


def _wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in causal.model.layers:
        fully_shard(layer)
    if how == "fsdp2, the head by itself":
        fully_shard(causal.lm_head)
    return fully_shard(model)


_CASES = [
    ("ddp", {"tie": True, "adapters": None}),
    ("ddp", {"tie": False, "adapters": "head"}),
    ("fsdp2", {"tie": False, "adapters": None}),
    ("fsdp2", {"tie": True, "adapters": None}),
    ("fsdp2, the head by itself", {"tie": False, "adapters": None}),
    ("fsdp2", {"tie": False, "adapters": "layers"}),
    ("fsdp2", {"tie": False, "adapters": "head"}),
    ("fsdp2, the head by itself", {"tie": False, "adapters": "head"}),
]


def _worker(rank: int, port: int, seed: int, tiny: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()}  # for accelerate
    distributed.init_process_group("gloo")
    _check_patched_models(rank, seed)
    _check_ppo_trainer(tiny, output_dir)
    distributed.destroy_process_group()


def _check_ppo_trainer(tiny: str, output_dir: str) -> None:
    """Each process samples prompts of its own; the parameters stay the same in both."""
    from test_integration_trl_ppo import _trainer

    trainer = _trainer(tiny, output_dir, per_device_train_batch_size=2, save_strategy="steps", save_steps=1)
    before = nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    sampled = []
    sample = trainer._sample

    def watched(inputs):
        rollout = sample(inputs)
        sampled.append(rollout.sequences.flatten()[-5:])
        return rollout

    trainer._sample = watched
    trainer.train()
    assert trainer.state.global_step == 4  # 32 episodes in rollouts of 2 · 2 · 2
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    after = nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    assert not after.equal(before)
    for value, same in ((after, True), (sampled[0], False)):
        both = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(both, value)
        assert both[0].equal(both[1]) is same
    evaluated = [None, None]
    distributed.all_gather_object(evaluated, trainer.evaluate())
    assert evaluated[0] == evaluated[1]
    resumed = _trainer(tiny, output_dir, per_device_train_batch_size=2, gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=f"{output_dir}/checkpoint-3")
    assert nn.utils.parameters_to_vector(resumed.model.parameters()).equal(after)
    best = _trainer(
        tiny,
        f"{output_dir}-best",
        per_device_train_batch_size=2,
        total_episodes=16,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_objective/scores",
    )
    best.train()
    assert best.state.best_model_checkpoint == f"{output_dir}-best/checkpoint-{best.state.best_global_step}"


def _check_patched_models(rank: int, seed: int) -> None:
    for how, options in _CASES:
        torch.manual_seed(seed)  # the same models and batches in both processes
        plain = _model(**options)
        batches = [_batch(), _batch()]
        model = _wrap(fastppo.patch_model(copy.deepcopy(plain)), how)
        for step in range(2):  # FSDP2 sets itself up in the first
            out = model(**batches[rank], return_logprobs=True)
            loss = out.loss + 0.1 * out.entropy.sum()
            loss.backward()
            own = [_plain_loss(plain, batch) for batch in batches]
            torch.testing.assert_close(loss, own[rank], rtol=1e-9, atol=1e-9)
            (sum(own) / 2).backward()
            names = {name.removeprefix("module."): p for name, p in model.named_parameters()}
            for name, parameter in plain.named_parameters():
                if parameter.grad is None:
                    assert names[name].grad is None, (how, options, name)
                    continue
                ours = names[name].grad
                ours = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
                torch.testing.assert_close(
                    ours,
                    parameter.grad,
                    rtol=1e-8,
                    atol=1e-8,
                    msg=lambda m, case=(how, options, name, step): f"{case}: {m}",
                )
            for parameters in (model.parameters(), plain.parameters()):
                for parameter in parameters:
                    parameter.grad = None


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes(tmp_path):
    for name in ("peft", "accelerate", "datasets"):
        pytest.importorskip(name, reason="some cases have adapters, and PPOTrainer takes a dataset")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seed = int(torch.randint(2**31, ()))
    tiny = make_tiny_model(tmp_path / "tiny")
    # In one go: most of the time goes into starting processes.
    torch.multiprocessing.spawn(_worker, (port, seed, str(tiny), str(tmp_path / "ppo")), nprocs=2)
