"""The OpenRLHF adapter against OpenRLHF's own functions: values, gradients, masks, options, signatures, the patch."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import rl_libraries
import torch
from rl_libraries import assert_same, draw, load, parameters, replaced_pairs
from torch import Tensor

from fastppo.integrations import openrlhf as adapter
from fastppo.integrations import patching

TOTALS = [{}, {"dp_size": 3, "batch_num_tokens": 101.0, "global_batch_size": 17.0}]


@pytest.fixture(scope="module")
def losses():
    return load("openrlhf.models.loss")


@pytest.fixture(scope="module")
def utils():
    return load("openrlhf.models.utils")


def action_mask(batch: int, time: int) -> Tensor:
    """Holes anywhere; at least one token a sequence."""
    mask = torch.rand(batch, time) < 0.7
    mask[torch.arange(batch), torch.randint(0, time, (batch,))] = True
    return mask


def value_and_gradient(function, x: Tensor, *arguments, **options):
    """With a copy for the function: OpenRLHF divides logits by the temperature in place."""
    return rl_libraries.value_and_gradient(lambda leaf: function(leaf * 1, *arguments, **options), x)


def test_the_signatures_are_openrlhfs():
    for name, mine, theirs in replaced_pairs(adapter._PATCH.replacements):
        assert parameters(mine) == parameters(theirs), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy_from_logits(utils, dtype, temperature):
    logits, labels = (draw(3, 5, 37) * 3).to(dtype), torch.randint(0, 37, (3, 5))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    before = logits.clone()
    theirs = value_and_gradient(utils.log_probs_from_logits, logits, labels, temperature)
    assert_same(value_and_gradient(adapter.log_probs_from_logits, logits, labels, temperature), theirs, tolerance)
    assert torch.equal(logits, before)
    # The eager function below torch.compile's wrapper: nothing is learned from compiling it here.
    theirs = value_and_gradient(inspect.unwrap(utils.compute_entropy), logits)
    assert_same(value_and_gradient(adapter.compute_entropy, logits), theirs, tolerance)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_approximate_kl(utils, estimator, unbiased, off_policy):
    log_probs = torch.randn(4, 6) - 2
    base = log_probs + torch.randn(4, 6)
    base[0, :4] = log_probs[0, :4] + torch.tensor([200.0, 12.0, -12.0, -200.0])  # beyond where it is capped
    old = log_probs + torch.randn(4, 6) * 3 if off_policy else None
    mine, theirs = (
        value_and_gradient(m.compute_approx_kl, log_probs, base, old, estimator, unbiased) for m in (adapter, utils)
    )
    assert torch.isfinite(mine[1]).all()
    assert_same(mine, theirs, 1e-4)
    with pytest.raises(ValueError, match="kl_estimator"):
        adapter.compute_approx_kl(log_probs, base, kl_estimator="k4")


CORRECTIONS = [
    {},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "token", "is_correction_threshold": [0.7, 1.5]},
    {"is_correction_level": "seq", "is_correction_threshold": [0.8, 1.2]},
    *(
        {"is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": [0.0, bound]}
        for level, (gating, bound) in itertools.product(["token", "seq"], [("binary_kl", 0.02), ("tv", 0.1)])
    ),
]


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("totals", TOTALS, ids=["local", "global"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(str(v) for v in c.values()) or "off")
def test_policy_loss(losses, kind, dual_clip, token_level, totals, correction):
    options = {
        "clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": dual_clip, "token_level_loss": token_level,
        "policy_loss_type": kind, **correction,
    }  # fmt: skip
    mask, advantages = action_mask(5, 7), draw(5, 7)
    log_probs = -draw(5, 7).abs()
    old = log_probs + draw(5, 7, scale=0.4)
    if kind == "ppo":  # beyond where OpenRLHF bounds the log-ratio
        old[0, :2] += torch.tensor([30.0, -30.0], dtype=torch.float64)
    rollout = old + draw(5, 7, scale=0.3)
    mine, theirs = (
        value_and_gradient(loss_class(**options), log_probs, old, advantages, mask, rollout, **totals)
        for loss_class in (adapter.PolicyLoss, losses.PolicyLoss)
    )
    assert_same(mine, theirs)


def test_policy_loss_without_a_mask_and_with_what_stands_on_padding(losses):
    log_probs, old, advantages = draw(3, 4), draw(3, 4), draw(3, 4)
    mine, theirs = (value_and_gradient(module.PolicyLoss(), log_probs, old, advantages) for module in (adapter, losses))
    assert_same(mine, theirs)

    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    results = []
    for filling in (0.0, torch.nan):
        arguments = (x.masked_fill(mask == 0, filling) for x in (log_probs, old, advantages))
        loss = adapter.PolicyLoss(is_correction_level="seq", is_correction_threshold=[0.0, 1e9])
        results.append(value_and_gradient(loss, *arguments, mask, old.masked_fill(mask == 0, filling)))
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert torch.equal(clean_gradient, dirty_gradient)
    (nothing, *_), gradient = value_and_gradient(adapter.PolicyLoss(), log_probs, old, advantages, mask * 0)
    assert nothing == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy_loss_type": "trpo"}, "policy_loss_type"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": "3"}, "dual_clip"),
        ({"is_correction_level": "batch"}, "is_correction_level"),
        ({"is_correction_mode": "drop"}, "is_correction_mode"),
        ({"is_correction_gating": "kl"}, "is_correction_gating"),
        ({"is_correction_mode": "clip", "is_correction_level": "seq"}, "is_correction_mode"),
        ({"is_correction_gating": "tv", "is_correction_level": "seq"}, "is_correction_threshold"),
        ({"is_correction_threshold": (5.0, 0.5), "is_correction_level": "token"}, "is_correction_threshold"),
        ({"is_correction_threshold": 2.0, "is_correction_level": "token"}, "is_correction_threshold"),
    ],
)
def test_bad_options_are_named(losses, options, named):
    with pytest.raises((TypeError, ValueError), match=f"^{named}: "):
        adapter.PolicyLoss(**options)
    # OpenRLHF looks at policy_loss_type only when the loss is computed, and at the order of the thresholds never.
    if named != "policy_loss_type" and not options.get("is_correction_threshold"):
        with pytest.raises((TypeError, ValueError, AssertionError)):
            losses.PolicyLoss(**options)


def test_errors_name_openrlhfs_arguments():
    tensors = dict.fromkeys(
        ("log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs"), torch.ones(2, 3)
    )
    for options, named in (({"clip_eps_low": -1.0}, "clip_eps_low"), ({"clip_eps_high": -1.0}, "clip_eps_high")):
        with pytest.raises(ValueError, match=f"^{named}: "):
            adapter.PolicyLoss(**options)(**tensors)
    values = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^clip_eps: "):
        adapter.ValueLoss(-1.0)(values, values, values)
    for name in tensors.keys() - {"log_probs"}:  # PyTorch would broadcast these
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            adapter.PolicyLoss(is_correction_level="token")(**tensors | {name: torch.ones(2, 1)})
    for name in ("log_probs", "old_log_probs", "advantages"):  # the others may be None
        with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor, got None"):
            adapter.PolicyLoss()(**tensors | {name: None})
    with pytest.raises(TypeError, match=r"^labels: expected a torch.Tensor"):
        adapter.log_probs_from_logits(torch.ones(2, 5), [0, 1])
    with pytest.raises(ValueError, match=r"^action_mask: expected shape"):
        adapter.ValueLoss(0.2)(values, values, values, torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"^log_probs_base: expected shape"):
        adapter.compute_approx_kl(values, torch.ones(2, 1))


def test_the_correction_needs_the_rollouts_log_probs():
    with pytest.raises(ValueError, match="rollout_log_probs"):
        adapter.PolicyLoss(is_correction_level="token")(*(torch.randn(2, 3) for _ in range(3)))


@pytest.mark.parametrize("clip_eps", [None, 0.2])
@pytest.mark.parametrize(
    ("token_level", "totals", "masked"),
    # Without a mask OpenRLHF takes the mean over all tokens, and nothing else.
    [*itertools.product([True, False], TOTALS, [True]), (True, {}, False)],
)
def test_value_loss(losses, clip_eps, token_level, totals, masked):
    values, returns = draw(4, 6), draw(4, 6)
    old, mask = values + draw(4, 6, scale=0.3), action_mask(4, 6) if masked else None
    mine, theirs = (
        value_and_gradient(module.ValueLoss(clip_eps, token_level), values, old, returns, mask, **totals)
        for module in (adapter, losses)
    )
    assert_same(mine, theirs)


def test_patch_reaches_every_reference_and_unpatch_restores_it(losses):
    models, actor = load("openrlhf.models"), load("openrlhf.models.actor")
    originals = (models.PolicyLoss, models.ValueLoss, actor.log_probs_from_logits, actor.compute_entropy)
    with adapter.patched():
        assert models.PolicyLoss is losses.PolicyLoss is adapter.PolicyLoss
        assert models.ValueLoss is losses.ValueLoss is adapter.ValueLoss
        assert actor.log_probs_from_logits is adapter.log_probs_from_logits
        assert actor.compute_entropy is adapter.compute_entropy
        with pytest.raises(RuntimeError, match="already patched by fastppo"):
            adapter.patch()
    assert originals == (models.PolicyLoss, models.ValueLoss, actor.log_probs_from_logits, actor.compute_entropy)
    with pytest.raises(RuntimeError, match="not patched"):
        adapter.unpatch()


def test_another_librarys_patch_is_refused(losses, utils, monkeypatch):
    @functools.wraps(utils.log_probs_from_logits)
    def other(logits, labels, temperature=1.0):
        return logits.sum(-1)

    monkeypatch.setattr(utils, "log_probs_from_logits", other)
    policy_loss = losses.PolicyLoss
    with pytest.raises(RuntimeError, match="another patch"):
        adapter.patch()
    assert losses.PolicyLoss is policy_loss


@pytest.mark.parametrize(("found", "accepted"), [("0.11.1", False), ("0.11.2", True), ("0.12.0", False)])
def test_versions(monkeypatch, found, accepted):
    monkeypatch.setattr(patching, "version", lambda name: found)
    if accepted:
        patching.require("openrlhf", adapter.SUPPORTED)
    else:
        with pytest.raises(ImportError, match=rf"openrlhf {found} is installed.*openrlhf>=0.11.2,<0.12"):
            adapter.patch()


def test_openrlhfs_actor_gives_the_same_with_and_without_the_patch(losses):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=71, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    actor = load("openrlhf.models.actor").Actor(model)
    actor.temperature, actor.packing_samples = 0.9, False
    tokens, attention = torch.randint(0, 71, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    actions, old, advantages = torch.ones(2, 5), torch.randn(2, 5) - 4, torch.randn(2, 5)

    def step():
        from openrlhf.models import PolicyLoss

        model.zero_grad()
        log_probs, output = actor(tokens, actions, attention, return_output=True, return_entropy=True)
        loss, *metrics = PolicyLoss(dual_clip=3.0)(log_probs, old, advantages, actions)
        (loss - 0.01 * output.entropy.mean()).backward()
        return log_probs, output.entropy, loss, *metrics, *[p.grad.clone() for p in model.parameters()]

    with adapter.patched():
        mine = step()
    with torch.compiler.set_stance("force_eager"):  # OpenRLHF compiles its entropy, which takes longer than this file
        assert_same(mine, step(), 1e-4)
