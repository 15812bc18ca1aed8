"""The verl adapter against verl's own functions: values, gradients, masks, options, signatures, and the patch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys

import pytest
import torch
from rl_libraries import assert_same, draw, find, load, parameters, replaced_pairs, value_and_gradient
from torch import Tensor

from fastppo.algorithms.correction import importance_weights
from fastppo.integrations import patching
from fastppo.integrations import verl as adapter

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
BATCH_INFO = [
    {},
    {"dp_size": 3, "batch_num_tokens": 101, "global_batch_size": 17, "loss_scale_factor": 40},
    {"dp_size": 1, "batch_num_tokens": torch.tensor(31), "global_batch_size": 9},
]


@pytest.fixture(scope="module")
def algos():
    return load("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="module")
def functional():
    return load("verl.utils.torch_functional")


@pytest.fixture
def patched(algos):
    load("verl.workers.utils.losses")  # it takes functions out of core_algos by name
    adapter.patch()
    yield
    adapter.unpatch()


def rollout_mask(batch: int, time: int) -> Tensor:
    """Holes anywhere, one sequence without a token, at least two tokens in all."""
    mask = torch.rand(batch, time) < 0.7
    mask[0], mask[1, :2] = False, True
    return mask


def skip_unless_known(algos, agg: str) -> None:
    if f'"{agg}"' not in inspect.getsource(algos.agg_loss):
        pytest.skip(f"this version of verl has no {agg}")


def test_the_signatures_are_verls():
    for name, mine, theirs in replaced_pairs(adapter._PATCH.replacements):
        if name.endswith("linear_cross_entropy"):
            theirs = functools.partial(theirs.__self__.forward, None)
        given, wanted = parameters(mine), parameters(theirs)
        # Older versions have fewer parameters: a prefix of ours, with the same names and defaults.
        assert given[: len(wanted)] == wanted, name
        assert all(default is not inspect.Parameter.empty for _, default in given[len(wanted) :]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_log_probs_and_entropy_from_logits(functional, shape, dtype):
    vocab = 37
    logits, labels = (draw(*shape, vocab) * 3).to(dtype), torch.randint(0, vocab, shape)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    theirs = value_and_gradient(functional.logprobs_from_logits, logits, labels)
    for inplace in (True, False):
        mine = value_and_gradient(adapter.logprobs_from_logits, logits, labels, inplace_backward=inplace)
        assert_same(mine, theirs, tolerance)
    theirs = value_and_gradient(functional.entropy_from_logits, logits)
    assert_same(value_and_gradient(adapter.entropy_from_logits, logits), theirs, tolerance)
    assert_same(value_and_gradient(adapter.entropy_from_logits_with_chunking, logits, 3), theirs, tolerance)


def test_the_backward_writes_over_the_logits_only_where_nothing_else_needs_them():
    hidden, weight, labels = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True), torch.randint(0, 11, (6,))
    logits = hidden @ weight.T
    before = logits.detach().clone()
    adapter.logprobs_from_logits(logits, labels).sum().backward()
    assert not torch.equal(logits, before)
    torch.testing.assert_close(weight.grad, logits.T @ hidden)  # the logits' memory now holds ∂logits

    kept = weight.detach().clone().requires_grad_()  # a leaf is a parameter
    adapter.logprobs_from_logits(kept, torch.randint(0, 8, (11,))).sum().backward()
    assert torch.equal(kept, weight)

    logits = hidden @ weight.T
    square = logits.square().sum()  # saves the logits
    adapter.logprobs_from_logits(logits, labels).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_log_probs_and_entropy_stay_in_range():
    for scale in (1.0, 1e2, 1e4):
        logits = (torch.randn(9, 50) * scale + 1e4 * torch.randn(())).bfloat16()
        log_probs = adapter.logprobs_from_logits(logits, torch.randint(0, 50, (9,)))
        entropy = adapter.entropy_from_logits(logits)
        assert log_probs.dtype == entropy.dtype == torch.float32
        assert (log_probs <= 0).all()
        assert ((entropy >= 0) & (entropy <= torch.tensor(50.0).log() + 1e-5)).all()


@pytest.mark.parametrize("shape", [(9,), (2, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear(shape, temperature):
    theirs = load("verl.utils.experimental.torch_functional").FusedLinearForPPO(chunk_size=4)
    mine = adapter.FusedLinearForPPO(chunk_size=4)
    hidden, weight = torch.randn(*shape, 16), torch.randn(53, 16) / 4
    labels, upstream = torch.randint(0, 53, shape), torch.randn(2, *shape)
    results = []
    for module in (mine, theirs):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        log_probs, entropy = module(h, w, labels, temperature=temperature)
        (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
        results.append((log_probs, entropy, h.grad, w.grad))
    assert_same(*results, 1e-4)
    with pytest.raises(ValueError, match="impl_backend"):
        adapter.FusedLinearForPPO(impl_backend="triton")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy_against_the_formula(reduction):
    """verl's own runs on a GPU only."""
    hidden, weight, labels = draw(2, 3, 8), draw(19, 8), torch.randint(0, 19, (2, 3))
    log_p = torch.log_softmax(hidden.view(6, 8) @ weight.T / 0.8, -1)
    wanted = log_p[torch.arange(6), labels.view(6)]
    wanted = {"none": wanted, "sum": wanted.sum(), "mean": wanted.mean()}[reduction]
    log_probs, entropy = adapter.linear_cross_entropy(hidden, weight, labels, 0.8, reduction)
    assert_same((log_probs, entropy), (wanted, -(log_p.exp() * log_p).sum(-1)))
    with pytest.raises(ValueError, match="reduction"):
        adapter.linear_cross_entropy(hidden, weight, labels, 0.8, "max")


def test_a_split_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(NotImplementedError, match="whole vocabulary"):
        adapter.linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2).long(), 1.0, "none", object())


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", BATCH_INFO, ids=["local", "global", "one-rank"])
def test_policy_loss(algos, agg, weighted, info):
    skip_unless_known(algos, agg)
    config = load("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1.5
    )
    config.global_batch_info.update(info)
    batch, time = 5, 7
    mask, advantages = rollout_mask(batch, time), draw(batch, time)
    log_probs = draw(batch, time) - 2
    old = log_probs + draw(batch, time, scale=0.4)
    old[1, 0], old[1, 1] = log_probs[1, 0] + 30, log_probs[1, 1] - 30  # beyond where verl bounds the log-ratio
    weights = None
    if weighted:
        weights = torch.rand(batch, time, dtype=torch.float64) * 2 * (torch.rand(batch, time) < 0.8)

    def run(function):
        def loss(x):
            return function(old, x, advantages, mask, loss_agg_mode=agg, config=config, rollout_is_weights=weights)

        return value_and_gradient(loss, log_probs)

    (mine, mine_metrics), mine_gradient = run(adapter.compute_policy_loss)
    (theirs, their_metrics), their_gradient = run(algos.get_policy_loss_fn("vanilla"))
    assert_same((mine, mine_gradient), (theirs, their_gradient))
    assert mine_metrics == pytest.approx(their_metrics, abs=1e-6)


def test_policy_loss_lets_nothing_through_from_padding():
    config = load("verl.workers.config").ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    log_probs = torch.randn(2, 4)
    poisoned = log_probs.clone()
    poisoned[:, 3:] = torch.nan
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]])
    results = []
    for x in (log_probs, poisoned):
        results.append(
            value_and_gradient(
                lambda x: adapter.compute_policy_loss(log_probs * 1.1, x, torch.ones(2, 4), mask, config=config), x
            )
        )
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    assert torch.equal(clean[0], dirty[0])
    assert clean[1] == dirty[1]
    assert torch.equal(clean_gradient, dirty_gradient)
    nothing, gradient = value_and_gradient(
        lambda x: adapter.compute_policy_loss(log_probs, x, torch.ones(2, 4), mask * 0, config=config), log_probs
    )
    assert nothing[0] == 0
    assert not gradient.any()
    with pytest.raises(ValueError, match="config"):
        adapter.compute_policy_loss(log_probs, log_probs, log_probs, mask)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("info", BATCH_INFO, ids=["local", "global", "one-rank"])
def test_value_loss_and_aggregation(algos, agg, info):
    skip_unless_known(algos, agg)
    mask, values, returns = rollout_mask(4, 6), draw(4, 6), draw(4, 6)
    old = values + draw(4, 6, scale=0.3)
    for function in ("compute_value_loss", "agg_loss"):
        if info and "dp_size" not in inspect.signature(getattr(algos, function)).parameters:
            continue  # verl 0.8 normalizes the value loss over the tokens at hand only
        arguments = (returns, old, mask, 0.2, agg) if function == "compute_value_loss" else (mask, agg)
        mine, theirs = (
            value_and_gradient(getattr(module, function), values, *arguments, **info) for module in (adapter, algos)
        )
        assert_same(mine, theirs)


def test_the_value_clip_fraction_counts_the_clipped_tokens_only(algos):
    """Within the clip range old + (v - old) is not always v to the last bit."""
    values, returns = torch.randn(20, 50), torch.randn(20, 50)
    old, mask = values + 0.25 * torch.randn(20, 50), torch.ones(20, 50)
    mine, theirs = (m.compute_value_loss(values, returns, old, mask, 0.2)[1] for m in (adapter, algos))
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_aggregation_over_ranks_needs_the_totals():
    for agg, name in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=name):
            adapter.agg_loss(torch.ones(2, 3), torch.ones(2, 3), agg, dp_size=2)
    with pytest.raises(ValueError, match=r"^loss_agg_mode: "):
        adapter.agg_loss(torch.ones(2, 3), torch.ones(2, 3), "median")
    # A batch without a token on any rank.
    for agg, total in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        assert adapter.agg_loss(torch.ones(2, 3), torch.zeros(2, 3), agg, dp_size=2, **{total: 0}) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"clip_ratio": -1.0}, "clip_ratio"),
        ({"clip_ratio_low": -1.0}, "clip_ratio_low"),
        ({"clip_ratio_high": "wide"}, "clip_ratio_high"),
        ({"clip_ratio_c": 0.5}, "clip_ratio_c"),
    ],
)
def test_errors_name_verls_options(options, named):
    class Config(dict):
        __getattr__ = dict.__getitem__

    tensors = [torch.ones(2, 3)] * 4
    with pytest.raises((TypeError, ValueError), match=f"^{named}: "):
        adapter.compute_policy_loss(*tensors, config=Config({"clip_ratio": 0.2} | options))


@pytest.mark.parametrize("wrong", [None, "half", [0.5]], ids=repr)
def test_what_is_of_another_type_is_named_as_verl_names_it(wrong):
    mask, ids, weight = torch.ones(2, 3), torch.zeros(2, 3).long(), torch.ones(5, 3)
    config = type("Config", (dict,), {"__getattr__": dict.__getitem__})(clip_ratio=0.2)
    policy = dict.fromkeys(("old_log_prob", "log_prob", "advantages", "response_mask"), mask) | {"config": config}
    value = dict.fromkeys(("vpreds", "returns", "values", "response_mask"), mask) | {"cliprange_value": 0.2}
    rewards = dict.fromkeys(("token_level_rewards", "values", "response_mask"), mask) | {"gamma": 1.0, "lam": 1.0}
    logits = {"logits": torch.ones(2, 3, 5), "labels": ids}
    head = {"hidden_states": torch.ones(2, 3, 3), "vocab_weights": weight, "input_ids": ids, "temperature": 1.0}
    linear = {"hidden": torch.ones(2, 3, 3), "weight": weight, "labels": ids, "temperature": 1.0}
    for function, arguments in (
        (adapter.compute_policy_loss, policy),
        (adapter.compute_value_loss, value),
        (adapter.compute_gae_advantage_return, rewards),
        (adapter.agg_loss, {"loss_mat": mask, "loss_mask": mask, "loss_agg_mode": "token-mean"}),
        (adapter.kl_penalty, {"logprob": mask, "ref_logprob": mask}),
        (adapter.logprobs_from_logits, logits),
        (adapter.FusedLinearForPPO().forward, head),
        (adapter.linear_cross_entropy, linear),
    ):
        others = {"kl_penalty": "k1"} if function is adapter.kl_penalty else {}
        function(**arguments, **others)
        for name in arguments.keys() - {"config"}:
            if (name, wrong) != ("cliprange_value", None):  # unclipped
                with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
                    function(**arguments | {name: wrong}, **others)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (3,)])
def test_what_pytorch_would_broadcast_is_refused_by_name(shape):
    """A reward or mask per sequence in place of one per token gives a number, and a wrong one."""
    right, wrong = torch.ones(2, 3), torch.ones(shape)
    for function, names, options in (
        (adapter.compute_policy_loss, ("old_log_prob", "log_prob", "advantages", "response_mask"), {"config": {}}),
        (adapter.compute_value_loss, ("vpreds", "returns", "values", "response_mask"), {"cliprange_value": 0.2}),
        (
            adapter.compute_gae_advantage_return,
            ("token_level_rewards", "values", "response_mask"),
            {"gamma": 1, "lam": 1},
        ),
        (adapter.agg_loss, ("loss_mat", "loss_mask"), {"loss_agg_mode": "token-mean"}),
        (adapter.kl_penalty, ("logprob", "ref_logprob"), {"kl_penalty": "k3"}),
    ):
        for name in names[1:]:
            if name not in ("log_prob", "advantages"):  # the pattern, and ppo_loss's own check
                with pytest.raises(ValueError, match=f"^{name}: expected shape"):
                    function(**dict.fromkeys(names, right) | {name: wrong} | options)


KINDS = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}+" for kind in KINDS)])
def test_kl_penalty(algos, kind):
    log_probs = draw(4, 6)
    ref = log_probs + draw(4, 6)
    ref[0, 0], ref[0, 1] = log_probs[0, 0] + 25, log_probs[0, 1] - 25
    mine, theirs = (value_and_gradient(m.kl_penalty, log_probs, ref, kl_penalty=kind) for m in (adapter, algos))
    assert_same(mine, theirs, 1e-9)


def test_k3_keeps_its_digits_for_close_policies(algos):
    log_probs = torch.randn(100) - 3
    ref = log_probs + 1e-4 * torch.randn(100)
    exact = adapter.kl_penalty(log_probs.double(), ref.double(), "k3")

    def error(module) -> float:
        return (module.kl_penalty(log_probs, ref, "k3").double() - exact).abs().max().item()

    assert error(adapter) < 1e-9 < error(algos)
    with pytest.raises(NotImplementedError, match="kl_penalty"):
        adapter.kl_penalty(log_probs, ref, "full")


def test_gae(algos):
    mask, rewards, values = rollout_mask(6, 13), draw(6, 13), draw(6, 13)
    mine, theirs = (
        module.compute_gae_advantage_return(rewards, values, mask.long(), 0.97, 0.9) for module in (adapter, algos)
    )
    for ours, verls in zip(mine, theirs, strict=True):
        assert_same(ours[mask], verls[mask])
        assert not ours[~mask].any()


def test_registered_names(algos):
    adapter.register()
    adapter.register()
    assert algos.get_policy_loss_fn("fastppo") is adapter.compute_policy_loss
    estimator = algos.get_adv_estimator_fn("fastppo_gae")
    rewards, mask = draw(3, 5), torch.ones(3, 5)
    wanted = algos.compute_gae_advantage_return(rewards, rewards * 2, mask, 1.0, 0.95)
    assert_same(
        estimator(token_level_rewards=rewards, values=rewards * 2, response_mask=mask, gamma=1.0, lam=0.95), wanted
    )
    with pytest.raises(ValueError, match="adv_estimator=gae"):
        estimator(token_level_rewards=rewards, response_mask=mask, config=None)


def test_a_taken_name_is_refused(algos, monkeypatch):
    monkeypatch.setitem(algos.POLICY_LOSS_REGISTRY, "fastppo", lambda: None)
    with pytest.raises(RuntimeError, match="registered already"):
        adapter.register()
    agg_loss = algos.agg_loss
    with pytest.raises(RuntimeError, match="registered already"):
        adapter.patch()
    assert algos.agg_loss is agg_loss


def test_patch_reaches_every_reference_and_unpatch_restores_it(algos, functional):
    losses = load("verl.workers.utils.losses")
    originals = {name: find(name) for name in adapter._PATCH.replacements}
    with adapter.patched():
        for name, replacement in adapter._PATCH.replacements.items():
            assert find(name) is replacement
        assert losses.kl_penalty is adapter.kl_penalty  # `from verl.trainer.ppo.core_algos import ...`
        assert algos.get_adv_estimator_fn("gae") is adapter.compute_gae_advantage_return
        picked_up_later = type(sys)("verl.picked_up_later")
        picked_up_later.kl_penalty = algos.kl_penalty
        sys.modules["verl.picked_up_later"] = picked_up_later
    try:
        assert {name: find(name) for name in adapter._PATCH.replacements} == originals
        assert picked_up_later.kl_penalty is losses.kl_penalty is originals["verl.trainer.ppo.core_algos.kl_penalty"]
        assert algos.get_adv_estimator_fn("gae") is algos.compute_gae_advantage_return
    finally:
        del sys.modules["verl.picked_up_later"]


def test_patching_twice_is_refused(patched, algos):
    with pytest.raises(RuntimeError, match=r"already patched by fastppo"):
        adapter.patch()
    assert algos.agg_loss is adapter.agg_loss


def test_unpatching_what_is_not_patched_is_refused():
    with pytest.raises(RuntimeError, match="not patched"):
        adapter.unpatch()


@pytest.mark.parametrize("disguised", [False, True])
def test_another_librarys_patch_is_refused(algos, functional, monkeypatch, disguised):
    def other(logits):
        return logits.sum(-1)

    if disguised:
        other = functools.wraps(functional.entropy_from_logits)(other)
    monkeypatch.setattr(functional, "entropy_from_logits", other)
    logprobs = functional.logprobs_from_logits
    with pytest.raises(RuntimeError, match=r"entropy_from_logits is .* from .*test_verl.*another patch"):
        adapter.patch()
    assert functional.logprobs_from_logits is logprobs  # all or nothing


def test_a_method_patched_into_a_class_is_refused(algos, monkeypatch):
    module = load("verl.utils.experimental.torch_functional")
    monkeypatch.setattr(module.FusedLinearForPPO, "forward", lambda self, *_: None)
    with pytest.raises(RuntimeError, match="FusedLinearForPPO"):
        adapter.patch()


def test_a_patch_put_over_fastppos_stops_unpatch(patched, functional, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(functional, "entropy_from_logits", lambda logits: logits)
        with pytest.raises(RuntimeError, match="put over"):
            adapter.unpatch()
        assert functional.logprobs_from_logits is adapter.logprobs_from_logits


def test_importing_verl_patch_patches(algos):
    importlib.import_module("fastppo.integrations.verl_patch")
    assert algos.agg_loss is adapter.agg_loss
    adapter.unpatch()
    del sys.modules["fastppo.integrations.verl_patch"]


@pytest.mark.parametrize(("found", "accepted"), [("0.7.1", False), ("0.8.0", True), ("0.9.9", True), ("0.10.0", False)])
def test_versions(monkeypatch, found, accepted):
    monkeypatch.setattr(patching, "version", lambda name: found)
    if accepted:
        patching.require("verl", adapter.SUPPORTED)
    else:
        with pytest.raises(ImportError, match=rf'verl {found} is installed.*pip install "verl>=0.8,<0.10"'):
            adapter.patch()


def test_a_missing_library_is_named():
    with pytest.raises(ImportError, match="no-such-library is not installed"):
        patching.require("no-such-library", ">=1")


def test_verls_fused_forward_of_a_model_gives_the_same_with_and_without_the_patch(algos):
    """The forward that verl puts into transformers models for use_fused_kernels=True."""
    from transformers import LlamaConfig, LlamaForCausalLM

    forward = load("verl.models.transformers.dense_common").forward_with_torch_backend
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=71, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    tokens, upstream = torch.randint(0, 71, (2, 9)), torch.randn(2, 2, 9)
    results = []
    for context in (adapter.patched, contextlib.nullcontext):
        model.zero_grad()
        with context():
            out = forward(model, input_ids=tokens, temperature=0.9, return_dict=True)
        (out.log_probs * upstream[0] + out.entropy * upstream[1]).sum().backward()
        results.append((out.log_probs, out.entropy, *[p.grad.clone() for p in model.parameters()]))
    assert_same(*results, 1e-4)


LOW, HIGH = 0.8, 1.25  # reciprocal, since verl compares the reciprocal of a sequence's ratio in its rejection
CORRECTIONS = {
    "token, truncated": ("truncate", {"rollout_is": "token", "rollout_is_threshold": HIGH}),
    "token, icepop": ("mask", {"rollout_is": "token", "rollout_is_threshold": f"{LOW}_{HIGH}"}),
    "sequence, truncated": ("sequence_ratio", {"rollout_is": "sequence", "rollout_is_threshold": HIGH}),
    "sequence, masked": ("sequence_mask", {"rollout_is": "sequence", "rollout_is_threshold": f"{LOW}_{HIGH}"}),
    "sequence, rejected": (
        "sequence_mask",
        {"rollout_is": "sequence", "rollout_is_threshold": 1e3}
        | {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": f"{LOW}_{HIGH}"},
    ),
    "token, normalized": (None, {"rollout_is": "token", "rollout_is_batch_normalize": True}),
    "geometric rejection": (None, {"rollout_is": None, "rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.8_1.2"}),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rollout_corrections_pass_through(algos, patched, name):
    """Decoupled: verl's weights and masks, by its loss and by ours. Bypass: verl's losses, on our aggregation."""
    method, options = CORRECTIONS[name]
    correct = load("verl.trainer.ppo.rollout_corr_helper").compute_rollout_correction_and_rejection_mask
    correction = load("verl.trainer.config.algorithm").RolloutCorrectionConfig
    configs = load("verl.workers.config")
    torch.manual_seed(0)
    mask, old, advantages = rollout_mask(6, 5), draw(6, 5) - 3, draw(6, 5)
    rollout, log_probs = (old + draw(6, 5, scale=0.3) for _ in range(2))
    weights, kept, _ = correct(old, rollout, mask.long(), **options)
    weights = weights and weights.batch["rollout_is_weights"]
    if method is not None:
        own, changed = importance_weights(old, rollout, mask, method, LOW, HIGH)
        assert_same(own, weights * kept)
        assert changed.any()
        assert (own > 0).any()

    def run(name, corrected, **bypass):
        function = algos.get_policy_loss_fn(name)
        policy_loss = configs.PolicyLossConfig(rollout_correction=correction(**options, **bypass))
        config = configs.ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy_loss)

        def loss(x):
            return function(old, x, advantages, kept, config=config, rollout_is_weights=corrected)

        return value_and_gradient(loss, log_probs)

    bypass = [{"bypass_mode": True, "loss_type": loss_type} for loss_type in ("ppo_clip", "reinforce")]
    mine = [run("fastppo", weights), *(run("bypass_mode", None, **mode) for mode in bypass)]
    adapter.unpatch()
    try:
        theirs = [run("vanilla", weights), *(run("bypass_mode", None, **mode) for mode in bypass)]
    finally:
        adapter.patch()
    for ((loss, metrics), gradient), ((their_loss, their_metrics), their_gradient) in zip(mine, theirs, strict=True):
        assert_same((loss, gradient), (their_loss, their_gradient))
        assert metrics == pytest.approx(their_metrics, abs=1e-6)
