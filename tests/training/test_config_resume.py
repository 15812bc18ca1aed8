"""Which keys may change on resume, and that an older configuration is still the same run's."""

import copy
import json
import math

import pytest

from fastppo.training.checkpoint import CheckpointError
from fastppo.training.config import build_config, to_dict
from fastppo.training.config_keys import documented_keys
from fastppo.training.config_resume import MAY_CHANGE, check_same_run, may_change

# Every other key. A new one belongs here or in MAY_CHANGE: may a run that is resumed with another value be called the
# same run?
MUST_AGREE = {
    "": "seed algorithm",
    "model": "name_or_path dtype quantization autocast value_model value_name_or_path reference",
    "model.lora": "r lora_alpha target_modules",
    "data": "train eval train_split eval_split eval_size prompt_column apply_chat_template system_prompt "
    "max_prompt_length overlong",
    "rewards.N": "name function model label weight threshold multiplier_learning_rate normalize",
    "rollout": "num_prompts num_generations max_new_tokens temperature stop correction correction_min correction_max",
    "ALGORITHM": "num_mini_batches loss_agg entropy_coef gamma whiten_advantages whiten_rewards kl_coef kl_estimator "
    "kl_in kl_controller kl_target kl_horizon kl_coef_final multi_objective_aggregation reference_refresh_steps "
    "missing_eos_penalty cliprange_value",
    "reinforce": "vf_coef scale_rewards baseline",
    "actor_critic": "vf_coef lam n_steps",
    "ppo": "vf_coef lam scale_rewards num_ppo_epochs adv_estimator clip_low clip_high dual_clip ratio_level target_kl",
    "trpo": "lam num_value_epochs max_kl cg_iterations cg_tolerance damping fisher_method fisher_fraction "
    "line_search_steps line_search_shrink accept_ratio",
    "npg": "lam num_value_epochs max_kl cg_iterations cg_tolerance damping fisher_method fisher_fraction",
    "cpi": "lam num_value_epochs num_greedy_epochs step_size held_out_fraction num_distill_epochs",
    "optim": "name learning_rate value_learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "lr_scheduler_type warmup_steps",
}
ALGORITHMS = ("reinforce", "actor_critic", "ppo", "trpo", "npg", "cpi")


def a_config():
    tree = {"model": {"name_or_path": "m"}, "data": {"train": "d.txt"}, "rewards": [{"name": "r", "function": "f:f"}]}
    return json.loads(json.dumps(to_dict(build_config(tree))))


def test_every_key_is_decided():
    decided = set()
    for section, names in MUST_AGREE.items():
        for one in ALGORITHMS if section == "ALGORITHM" else [section]:
            decided |= {f"{one}.{name}".lstrip(".") for name in names.split()}
    known = {key.name for key in documented_keys()}
    free = {key for key in known if may_change(key.replace(".N.", ".3."))}
    assert sorted(known - free - decided) == []  # neither
    assert sorted(free & decided) == []  # both
    assert sorted(decided - known) == []  # gone
    names = known | {f"ALGORITHM.{key.partition('.')[2]}" for key in known if key.startswith(ALGORITHMS)}
    names.add("tensorboard")  # which a checkpoint of an earlier version may have
    assert [key for key in MAY_CHANGE if not any(f"{name}.".startswith(f"{key}.") for name in names)] == []


def test_keys_without_an_influence_on_the_result_may_change():
    saved, given = a_config(), a_config()
    check_same_run(saved, given)
    given |= {"output_dir": "elsewhere", "total_steps": 7, "report_to": "none", "on_nonfinite": "skip"}
    given |= {"device": "cuda:1", "backend": "triton"}
    given["rollout"]["generation_batch_size"] = 3
    given["rewards"][0]["batch_size"] = 1
    given["ppo"]["gradient_accumulation_steps"] = 4
    given["model"] |= {"allow_download": True, "gradient_checkpointing": True, "attn_implementation": "eager"}
    given["eval"] |= {"every": 3, "num_prompts": 1, "rewards": [{"name": "s", "function": "g:g"}]}
    given["watch"]["rules"].append({"metric": "x", "above": 1.0})
    given["checkpoint"]["keep_last"] = 9
    check_same_run(saved, given)


def test_all_differences_are_named():
    saved, given = a_config(), a_config()
    given["ppo"]["kl_coef"] = 0.25
    given["model"]["lora"] = {"r": 8}
    given["rewards"][0]["name"] = "s"
    given["rewards"].append({"name": "t"})
    with pytest.raises(CheckpointError) as caught:
        check_same_run(saved, given)
    message = str(caught.value)
    for part in (
        "ppo.kl_coef was 0.05, is now 0.25",
        'model.lora was null, is now {"r": 8',
        'rewards.0.name was "r", is now "s"',
        'rewards.1 was absent, is now {"name": "t"',
    ):
        assert part in message
    assert message.count(" was ") == 4
    assert "\n" not in message


def test_a_key_that_a_configuration_lacks_has_its_default():
    """An older checkpoint is not refused for a key that is new, nor for one that is gone."""
    saved, given = a_config(), a_config()
    del saved["optim"]["warmup_steps"], saved["rewards"][0]["normalize"], saved["npg"], saved["seed"]
    for name in ALGORITHMS:
        if name in saved:
            saved[name] |= {"length_penalty": 0.0, "reward_clip": None}
    saved["trpo"] |= {"preconditioner": "none", "preconditioner_probes": 8, "vector_dtype": "auto"}
    saved["ppo"]["importance_sampling_cap"] = None
    check_same_run(saved, given)
    check_same_run(given, saved)
    given["optim"]["warmup_steps"] = 5
    saved["trpo"]["reward_clip"] = 5.0
    saved["a_key_of_a_later_version"] = 1
    with pytest.raises(CheckpointError) as caught:
        check_same_run(saved, given)
    message = str(caught.value)
    assert "trpo.reward_clip was 5.0, is now null" in message
    assert "optim.warmup_steps was 0, is now 5" in message
    assert "a_key_of_a_later_version was 1, is now absent" in message
    assert message.count(" was ") == 3


def test_trees_of_any_kind_are_compared():
    saved, given = a_config(), a_config()
    saved["optim"]["weight_decay"] = given["optim"]["weight_decay"] = math.nan
    saved["rewards"] = tuple(saved["rewards"])
    check_same_run(saved, given)
    deep = 1
    for _ in range(900):
        deep = [deep]
    for wrong in ({"rewards": "x"}, {"ppo": 3}, {"model": deep}, {"model": {"lora": deep}}, {"evaluate": "x" * 10**6}):
        with pytest.raises(CheckpointError) as caught:
            check_same_run(copy.copy(saved) | wrong, given)
        assert len(str(caught.value)) < 1000
