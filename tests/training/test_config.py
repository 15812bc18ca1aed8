"""The configuration: what is refused, and in which words."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml

from fastppo.ops.checks import ARGUMENTS
from fastppo.training.config import ALGORITHMS, Config, ConfigError, build_config, load_config, to_dict
from fastppo.training.config_keys import documented_keys, explain, overview
from fastppo.training.rewards import build_rewards

BASE = {
    "model": {"name_or_path": "m"},
    "data": {"train": "d"},
    "rewards": [{"name": "a", "function": "f"}],
}


def write(tmp_path, tree):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_round_trip(tmp_path):
    config = load_config(write(tmp_path, BASE), ["--ppo.kl_coef", "1e-3", "--model.lora.r", "4"])
    assert config.ppo.kl_coef == 1e-3
    assert config.model.lora.r == 4
    assert build_config(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--ppo.kl_coeff", "1"], "ppo.kl_coeff: unknown key; did you mean 'ppo.kl_coef'?"),
        (["--modle.dtype", "float32"], "modle: unknown key; did you mean 'model'?"),
        (["--rewards.0.wieght", "2"], "rewards.0.wieght: unknown key; did you mean 'rewards.0.weight'?"),
        (["--model.lora.rank", "2"], "model.lora.rank: unknown key"),
        (["--ppo.kl_coef", "much"], "ppo.kl_coef: input should be a valid number"),
        (["--ppo.lam", "1.5"], "ppo.lam: input should be less than or equal to 1, got 1.5"),
        (
            ["--ppo.ratio_level", "sequnce"],
            "ppo.ratio_level: 'sequnce' is not one of token, sequence, sequence-geometric; did you mean 'sequence'?",
        ),
        (["--ppo.kl_coef"], "--ppo.kl_coef: needs a value"),
        (["ppo.kl_coef", "1"], "expected --section.key value"),
        (["--rewards.3.weight", "2"], "is not an index of a list of 1"),
        (["--seed.x", "2"], "--seed.x: seed is a single value"),
        (["--model.reference", "none"], "ppo.kl_coef: must be 0 when model.reference is none"),
        (["--ppo.num_mini_batches", "64"], "ppo.num_mini_batches: 64 parts"),
        (["--rewards.0.model", "x"], "rewards.0: give exactly one of"),
        (["--total_steps", "0"], "total_steps"),
        (["--optim.lr_scheduler_type", "cosin"], "did you mean 'cosine'?"),
        (["--optim.warmup_steps", "3"], "take constant_with_warmup"),
        (["--ppo.entropy_coef", ".nan"], "ppo.entropy_coef"),
        (["--optim.adam_beta1", "1.0"], "optim.adam_beta1"),
        (["--rewards.0.weight", ".inf"], "rewards.0.weight"),
        (["--rewards.0.name", "mean"], "is the name of a metric already"),
        (["--algorithm", "pppo"], "trpo, npg, cpi; did you mean 'ppo'?"),
        (["--device", "cpu", "--device"], "--device: needs a value"),
        (["--output_dir", ""], "output_dir: string should have at least 1 character, got ''"),
        (["--seed", "2024-99-99"], "seed: input should be a valid integer, unable to parse"),
        (["--seed", "1" * 5000], "seed: "),
        (["--rollout.generation_batch_size", "1" * 30], "rollout.generation_batch_size: input should be less than"),
        (["--ppo.lam", "[" * 3000], "ppo.lam: input should be a valid number"),
        (["--ppo.lam", "!!bool x"], "ppo.lam: input should be a valid number"),
        (["--model", "x"], "model: expected keys and their values, got 'x'"),
        (["--rewards." + "9" * 5000, "{}"], "is not an index of a list of 1"),
        (["--rewards.x.weight", "2"], "--rewards.x.weight: 'x' is not an index of a list of 1"),
        (["--rewards.0.name.x", "2"], "--rewards.0.name.x: rewards.0.name is a single value and has no keys below it"),
        (["--watch.rules.0.above", "2"], "--watch.rules.0.above: '0' is not an index of a list of 0"),
        (["--model.lora.target_modules", "3"], "model.lora.target_modules: input should be a valid string, got 3"),
        (["--total_steps", "true"], "total_steps: expected a number, got True"),
        (["--ppo.lam", "true"], "ppo.lam: expected a number, got True"),
        (["--ppo.dual_clip", "true"], "ppo.dual_clip: expected a number, got True"),
        (["--ppo.clip_low", "1.0e+300"], "ppo.clip_low: input should be less than"),
        (["--seed", "1.0e+300"], "seed: "),
        (["--optim.learning_rate", "1e40"], "learning_rate: input should be less than or equal to 3.40282e+38, got"),
        (["--rollout.temperature", "1e-11"], "temperature: input should be greater than or equal to 1e-10, got"),
        (["--ppo.importance_sampling_cap", "2"], "replaced by rollout.correction; write `correction: truncate`"),
        (["--rollout.correction_max", "0"], "correction_max: input should be greater than 0, got 0"),
        (["--report_to", "true"], "report_to.0: True is not one of tensorboard, trackio, wandb, mlflow"),
        (["--output_dir", "~nosuchuser/x"], "output_dir: there is no such user, got '~nosuchuser/x'"),
        (["--data.train", "a\0b"], "data.train: expected text without NUL"),
        (["--rewards.0.name", "\ud83d"], "rewards.0.name: expected text without NUL"),
        (["--device", "\ud83d"], r"halves of surrogate pairs, got '\ud83d'"),
        (["--model.lora.r", "1" + "0" * 9], "model.lora.r: input should be less than or equal to 16384"),
        (["--rollout.top_p", "0.9"], "rollout.top_p: would leave tokens out of the distribution that completions are"),
        (["--rollout.top_k", "20"], "rollout.top_k: would leave tokens out"),
        (["--rollout.min_p", "0.1"], "its logits; leave it out, or lower rollout.temperature"),
        (["--rollout.repetition_penalty", "1.1"], "rollout.repetition_penalty: would sample from another distribution"),
        (["--rollout.min_new_tokens", "4"], "rollout.min_new_tokens: would ban EOS at first"),
        (["--rollout.stop", "stop"], "rollout.stop: input should be a valid list, got 'stop'"),
        (["--rollout.stop", "['']"], "rollout.stop.0: string should have at least 1 character, got ''"),
        (["--rollout.num_prompts", "1" + "0" * 12], "rollout: 4000000000000 sequences"),
        (["--rollout.max_new_tokens", "1" + "0" * 12], "of up to 1000000000000 tokens are too much for a step"),
        (["--device", "x" * 10**6 + "y", "--seed", "x" * 10**6], "xxx..."),
        (["--model.lora.zzz", "3"], "model.lora.zzz: unknown key; known here: r, lora_alpha, target_modules"),
        (["--algorithm", "reinforce", "--ppo.lam", "1"], "ppo.lam: has no effect, since algorithm is 'reinforce'"),
        (["--algorithm", "trpo", "--ppo.lam", "1"], "set trpo.lam, or drop all with --ppo {}"),
        (["--algorithm", "cpi", "--ppo.clip_low", "1"], "cpi has no such key, or drop all with --ppo {}"),
        (["--reinforce.baseline", "none"], "reinforce.baseline: has no effect, since algorithm is 'ppo'"),
        (["--ppo.adv_estimator", "grpo", "--ppo.vf_coef", "1"], "ppo.vf_coef: has no effect without a value function"),
        (["--ppo.adv_estimator", "rloo", "--ppo.lam", "1"], "ppo.lam: has no effect without GAE"),
        (["--ppo.scale_rewards", "none"], "ppo.scale_rewards: has no effect without grpo"),
        (["--model.value_name_or_path", "v"], "model.value_name_or_path: has no effect with model.value_model: shared"),
        (
            ["--model.value_name_or_path=v", "--model.value_model=adapter", "--model.lora.r=4"],
            "model.value_name_or_path: has no effect with model.value_model: adapter; set it to separate",
        ),
        (["--model.quantization", "nf4"], "model.quantization: weights in 4 bits cannot be trained; set model.lora"),
        (["--model.value_model", "adapter"], "model.value_model: adapter needs model.lora"),
        (
            ["--model.quantization=nf4", "--model.lora.r=4", "--model.value_model=separate"],
            "model.value_model: all parameters of a separate critic are trained, which model.quantization keeps in",
        ),
        (
            ["--model.quantization=nf4", "--model.lora.r=4", "--algorithm=trpo"],
            "trpo.fisher_method: gauss_newton needs forward-mode derivatives, which products with weights in 4 bits",
        ),
        (
            ["--model.value_name_or_path=v", "--model.value_model=separate", "--ppo.adv_estimator=reinforce_plus_plus"],
            "model.value_name_or_path: has no effect without a value function",
        ),
        (["--ppo.kl_target", "3"], "ppo.kl_target: has no effect without kl_controller: adaptive"),
        (
            ["--model.offload_idle", "true", "--model.lora", "{}"],
            "model.offload_idle: has no effect without a separate",
        ),
        (
            ["--model.offload_idle", "true", "--model.lora.r", "4", "--ppo.adv_estimator", "rloo"],
            "model.offload_idle: has no effect without a separate critic",
        ),
        (
            ["--model.offload_idle", "true", "--model.reference", "none", "--ppo.kl_coef", "0"],
            "model.offload_idle: has no effect without a separate critic",
        ),
        (
            ["--rollout.engine", "vlm"],
            "rollout.engine: 'vlm' is not one of auto, loop, transformers, continuous, vllm; did",
        ),
        (["--rollout.engine=loop", "--device=cuda"], "rollout.engine: loop samples on a CPU, and device is 'cuda'"),
        (
            ["--rollout.engine=continuous", "--rollout.vllm.enforce_eager=true"],
            "rollout.vllm.enforce_eager: has no effect with rollout.engine: continuous; set that to vllm",
        ),
        (["--rollout.vllm.gpu_memory_utilization", "1.5"], "utilization: input should be less than or equal to 1"),
        (["--rollout.vllm.gpu_memory_utilization", "0"], "utilization: input should be greater than 0"),
        (["--rollout.vllm.tensor_parallel_size", "0"], "tensor_parallel_size: input should be greater than 0"),
        (["--rollout.vllm", "3"], "rollout.vllm: expected keys and their values, got 3"),
        (["--rollout.stop", "['']"], "rollout.stop.0: string should have at least 1 character"),
        (["--rollout.stop", "END"], "rollout.stop: input should be a valid list, got 'END'"),
        (
            ["--rollout.correction_max", "3"],
            "rollout.correction_max: has no effect without rollout.correction; set that",
        ),
        (
            ["--rollout.correction=truncate", "--rollout.correction_min=0.1"],
            "rollout.correction_min: has no effect with correction: truncate",
        ),
        (
            ["--rollout.correction=mask", "--rollout.correction_min=5"],
            "correction_min: 5 to 5 (mask's bounds) leave out",
        ),
        (
            ["--rollout.correction=mask", "--rollout.correction_min=2"],
            "correction_min: 2 to 5 (mask's bounds) leave out",
        ),
        (
            ["--rollout.correction=sequence_mask", "--rollout.correction_max=0.9"],
            "correction_max: 0.5 to 0.9 (sequence_mask's bounds) leave out ratios around 1",
        ),
        (["--rollout.correction=mask", "--rollout.correction_max=0"], "correction_max: input should be greater than 0"),
        (["--rollout.correction", "tis"], "rollout.correction: 'tis' is not one of none, truncate, mask"),
        (["--optim.name", "paged_adamw_8bit", "--algorithm", "cpi"], "with paged_adamw_8bit every step of cpi"),
        (["--ppo.kl_coef_final", "3"], "ppo.kl_coef_final: has no effect without kl_controller: linear"),
        (
            ["--ppo.kl_controller", "adaptive", "--ppo.kl_coef", "0"],
            "ppo.kl_coef: must be above 0 for the adaptive controller",
        ),
        (
            ["--ppo.adv_estimator", "grpo", "--rollout.num_generations", "1"],
            "rollout.num_generations: grpo compares the completions of a prompt and needs at least 2",
        ),
        (
            ["--ppo.reference_refresh_steps", "2", "--model.lora.r", "4"],
            "ppo.reference_refresh_steps: not possible with model.lora",
        ),
        (
            ["--ppo.reference_refresh_steps", "2", "--model.reference", "none", "--ppo.kl_coef", "0"],
            "ppo.reference_refresh_steps: there is no reference",
        ),
        (
            ["--ppo.kl_controller", "linear", "--model.reference", "none", "--ppo.kl_coef", "0"],
            "ppo.kl_controller: there is no KL to weigh",
        ),
        (
            ["--ppo.multi_objective_aggregation", "normalize_then_sum"],
            "leaves no place for ppo.kl_in: reward, which belongs to no objective; put it in the loss",
        ),
        (
            [
                *("--ppo.multi_objective_aggregation", "normalize_then_sum", "--ppo.kl_coef", "0"),
                *("--ppo.kl_controller", "linear", "--ppo.kl_coef_final", "1"),
            ],
            "leaves no place for ppo.kl_in: reward, which belongs to no objective; put it in the loss",
        ),
        (
            ["--ppo.multi_objective_aggregation=normalize_then_sum", "--ppo.kl_coef=0", "--ppo.missing_eos_penalty=1"],
            "leaves no place for ppo.missing_eos_penalty, which belongs to no objective; write it as a reward",
        ),
        (["--rewards.0.threshold", "1"], "rewards: at least one must be an objective, without a threshold"),
        (["--rewards.0.threshold", "1", "--rewards.0.weight", "-1"], "rewards.0.weight: the initial multiplier"),
        (["--rewards.0.multiplier_learning_rate", "1"], "rewards.0.multiplier_learning_rate: only a constraint"),
    ],
)
def test_one_clear_line(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, BASE), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 or len("".join(overrides)) > 2_000


@pytest.mark.parametrize("section", ["model", "data"])
def test_what_every_run_needs(section):
    tree = copy.deepcopy(BASE)
    del tree[section]
    with pytest.raises(ConfigError, match=section):
        build_config(tree)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    for text, problem in (
        ("seed: 1\nppo: {lam: 1}\nseed: 2\n", r"line 3, column 1: 'seed' is given twice, first in line 1"),
        ("ppo: {lam: 1, gamma: 1, lam: 1}", r"'lam' is given twice"),
        ("seed:\t1\n\tppo: {}", r"line 1, column 6: .*\\t"),
        ("seed: 2024-99-99", "month must be in 1..12"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rf"bad\.yaml: not valid YAML \(.*{problem}"):
            load_config(tmp_path / "bad.yaml")
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    with pytest.raises(ConfigError, match=r"model\.name_or_path: required"):
        load_config(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"/dev/zero: cannot be read \(a device, not a file\)"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match="'': cannot be read"):
        load_config("")
    (tmp_path / "bad.yaml").write_text("a: " + "x" * 10**6)
    with pytest.raises(ConfigError, match="more than 262144 bytes"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(embedded null byte\)"):
        load_config("a\0b")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        load_config(tmp_path / "list.yaml")


def test_a_section_that_was_set_can_be_dropped(tmp_path):
    """A file for one algorithm serves another."""
    path = write(tmp_path, BASE | {"ppo": {"lam": 0.5}})
    config = load_config(path, ["--algorithm", "reinforce", "--ppo", "{}", "--reinforce.baseline", "batch-mean"])
    assert config.algorithm_config is config.reinforce
    assert config.reinforce.baseline == "batch-mean"


def test_an_override_changes_one_of_two_aliases(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE) + "watch: {rules: [&rule {metric: x, above: 1}, *rule]}\n")
    rules = load_config(path, ["--watch.rules.1.above", "2"]).watch.rules
    assert [rule.above for rule in rules] == [1, 2]


def test_every_way_to_write_an_override(tmp_path):
    words = ["--ppo.kl-coef=1e-3", "--ppo.dual_clip", "null", "--rewards.0.weight", "2", "--total-steps", "7"]
    words += ["--watch.rules", "[{metric: kl/reference, above: 20}]", "--watch.rules.0.patience", "3"]
    config = load_config(write(tmp_path, BASE | {"ppo": {"dual_clip": 3}}), words)
    assert (config.ppo.kl_coef, config.ppo.dual_clip, config.total_steps) == (1e-3, None, 7)
    assert config.rewards[0].weight == 2.0
    assert [(rule.above, rule.patience) for rule in config.watch.rules] == [(20.0, 3)]


def test_every_key_is_explained_where_it_was_inherited():
    help_of = {key.name: key.help for key in documented_keys()}
    for section in ALGORITHMS:
        assert help_of[f"{section}.kl_in"] == help_of["ppo.kl_in"] != ""
    assert "as in their papers" in help_of["ppo.whiten_advantages"]
    # ActorCriticConfig changes only this key's default.
    assert help_of["actor_critic.vf_coef"] == help_of["ppo.vf_coef"] != ""


def test_every_key_is_listed_once():
    names = [key.name for key in documented_keys()]
    assert len(names) == len(set(names))
    assert {"ppo.kl_coef", "rewards.N.function", "model.lora.r", "total_steps"} <= set(names)
    lines = overview().splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 120
    listed = [line.split(":")[0] for line in lines if " (" in line or line.endswith("...")]
    assert len(listed) == len(set(listed))
    for name in names:
        section, _, leaf = name.rpartition(".")
        assert name in listed or (section in ALGORITHMS and f"ALGORITHM.{leaf}" in listed)


def test_shared_keys_are_listed_with_the_defaults_that_differ():
    lines = overview().splitlines()
    about = [line.split(" (")[0] for line in lines if ".whiten_advantages: " in line]
    assert about == [
        "ALGORITHM.whiten_advantages: true",
        "reinforce.whiten_advantages: false",
        "ppo.whiten_advantages: null",
    ]
    assert [line.split(":")[0] for line in lines if ".kl_coef: " in line] == ["ALGORITHM.kl_coef"]


def test_a_section_is_explained_in_full():
    for section in ("ppo", "model", "optim", "watch", "rewards", "model.lora"):
        keys = [key for key in documented_keys() if key.name.startswith(f"{section}.")]
        text = explain(section)
        assert [line.split(":")[0] for line in text.splitlines() if line[0] != " "] == [key.name for key in keys]
        assert all(key.help in " ".join(text.split()) for key in keys)
    assert explain("seed") == "seed: 0 (int)"
    for word, hint in (("pppo", "did you mean 'ppo'?"), ("ppo.gama", "did you mean 'ppo.gamma'?"), ("", "lists them")):
        with pytest.raises(ConfigError, match=f"{word}: no such section or key; .*{re.escape(hint)}"):
            explain(word)


def test_text_from_the_command_line_stays_as_it_is(tmp_path):
    words = ["--output_dir", "runs/a #1", "--data.system_prompt", "You are: kind # always", "--data.eval", "null"]
    config = load_config(write(tmp_path, BASE), [*words, "--rewards.0.name", "007", "--model.lora", "{r: 3}"])
    assert config.output_dir == "runs/a #1"
    assert config.data.system_prompt == "You are: kind # always"
    assert config.data.eval is None
    assert config.rewards[0].name == "007"
    assert config.model.lora.r == 3


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("none", []),
        (None, []),
        ([], []),
        (["none"], []),
        ("wandb", ["wandb"]),
        (["mlflow", "trackio"], ["mlflow", "trackio"]),
    ],
)
def test_trackers_are_a_list_one_name_or_none(tmp_path, given, names):
    config = load_config(write(tmp_path, BASE | {"report_to": given}))
    assert config.report_to == names
    assert build_config(to_dict(config)) == config
    assert load_config(write(tmp_path, BASE), ["--report_to", yaml.safe_dump(given)]).report_to == names
    assert load_config(write(tmp_path, BASE)).report_to == ["tensorboard"]


@pytest.mark.parametrize("name", ["temperature", *sorted(ARGUMENTS.keys() & to_dict(Config().ppo))])
def test_the_operators_take_every_number_that_the_configuration_takes(name):
    section = "rollout" if name == "temperature" else "ppo"
    for value in (-1, 0, 1e-320, 1e-11, 1e-10, 0.5, 1, 1.5, 2, 1e10, 1e11, 3e38):
        with contextlib.suppress(ConfigError):
            given = getattr(getattr(build_config(BASE | {section: {name: value}}), section), name)
            ARGUMENTS[name](name, given)


HELD_OUT = {"name": "b", "function": "f"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"rewards": [HELD_OUT | {"name": "a"}]}}, "rewards.0.name: 'a' is used twice"),
        ({"eval": {"rewards": [HELD_OUT | {"weight": 2.0}]}}, "eval.rewards.0: a reward that is not trained on"),
        ({"eval": {"rewards": [HELD_OUT | {"name": "perplexity"}]}}, "eval.rewards.0.name: 'perplexity' is the name"),
        (
            {"eval": {"rewards": [HELD_OUT | {"name": "a_std"}]}},
            "rewards.0.name: a reward named a_std hides",
        ),
        ({"eval": {"rewards": [{"name": "b"}]}}, "eval.rewards.0: give exactly one of"),
        ({"watch": {"rules": [{"metric": "x"}]}}, "watch.rules.0: give `above`, `below` or both"),
        ({"watch": {"rules": [{"metric": "x", "above": 1, "below": 2}]}}, "watch.rules.0: every value is"),
        ({"watch": {"rules": [{"metric": "x", "abov": 1}]}}, "watch.rules.0.abov: unknown key; did you mean"),
        ({"watch": {"rules": [{"metric": "x", "above": 1, "action": "stopp"}]}}, "did you mean 'stop'?"),
        ({"watch": {"rules": [{"metric": "x", "above": 1}] * 2}}, "watch.rules.1: the same rule"),
        (
            {"watch": {"rules": [{"metric": "x", "above": 1, "action": "rollback"}]}, "checkpoint": {"every": 0}},
            "watch.rules.0.action: rollback needs checkpoints",
        ),
        (
            {"watch": {"rules": [{"metric": "eval/reward", "below": 1, "action": "stop"}]}},
            "watch.rules.0: eval/reward is known only after the last step; set eval.every",
        ),
    ],
)
def test_what_is_watched_and_held_out_is_checked(changes, message):
    with pytest.raises(ConfigError) as caught:
        build_config(copy.deepcopy(BASE) | changes)
    assert message in str(caught.value)


def test_the_examples_are_valid():
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    assert len(examples) >= 3
    for path in examples:
        data = load_config(path).data
        assert all((path.parents[1] / source).exists() for source in (data.train, data.eval) if source)


def test_the_example_for_eight_gpus_is_valid_and_can_be_divided():
    """Without its model and prompts; its reward, whose file is named as from the repository's root, is loaded."""
    root = Path(__file__).parents[2]
    config = load_config(root / "examples/large/llama_8b_8x80gb.yaml")
    assert (config.distributed.strategy, config.model.value_model, config.model.reference) == (
        "fsdp2",
        "separate",
        "frozen",
    )
    sequences = config.rollout.num_prompts * config.rollout.num_generations
    for count in (config.rollout.num_prompts, config.eval.num_prompts, config.ppo.micro_batch_size(sequences)):
        assert count % 8 == 0
    [reward] = config.rewards
    rewards = build_rewards([dataclasses.replace(reward, function=str(root / reward.function))])
    rewards.check_columns({"question", "answer"})
    completions = ["5 + 1,003 = 1,008", "**1008.0**", "$1008.", "7-1008", "no idea", "= -1008", "1008 apples, 9 pears"]
    answers = ["5 and <<5+1003=1008>>1003 make\n#### 1,008"] * len(completions)
    scores = rewards([""] * len(completions), completions, {"answer": answers}).total
    assert scores.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
