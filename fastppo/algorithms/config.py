"""The algorithms' sections of the configuration; keys that several of them share are written once, in a base class."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fastppo.config_fields import (
    STRICT,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
)


@dataclass(config=STRICT)
class AlgorithmConfig:
    """Keys of every algorithm: batches, rewards, the KL to the reference, the value function's loss."""

    num_mini_batches: PositiveInt = 1
    """Optimizer steps in an epoch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward and backward passes in an optimizer step."""
    loss_agg: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How the terms of the loss are averaged over tokens and sequences. `-norm` divides the sums by max_new_tokens."""
    entropy_coef: FiniteFloat = 0.0
    gamma: UnitFloat = 1.0
    whiten_advantages: bool = True
    """Scale the batch's advantages to mean 0 and standard deviation 1."""
    whiten_rewards: bool = False
    """Scale the batch's per-token rewards to standard deviation 1; their mean stays."""
    kl_coef: NonNegativeFloat = 0.05
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Estimate the KL from the sampled tokens, or compute it exactly over the vocabulary."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Subtract the KL penalty from the per-token rewards, or add it to the loss."""
    kl_controller: Literal["fixed", "adaptive", "linear"] = "fixed"
    """`adaptive` steers the KL to kl_target; `linear` moves kl_coef to kl_coef_final over kl_horizon completions."""
    kl_target: PositiveFloat = 6.0
    """Target of the adaptive controller, in nats a completion (Ziegler et al., 2019)."""
    kl_horizon: PositiveInt = 10000
    """Time constant of the adaptive controller, or length of the linear schedule, in completions."""
    kl_coef_final: NonNegativeFloat = 0.0
    """Last value of the linear schedule."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Advantages of the rewards' weighted sum, or a weighted sum of each reward's own (GDPO; Liu et al., 2026)."""
    reference_refresh_steps: NonNegativeInt = 0
    """Copy the policy into the reference every so many steps; 0 keeps the policy of the start."""
    missing_eos_penalty: NonNegativeFloat | None = None
    """Subtracted from the score of a completion that was cut at max_new_tokens."""
    cliprange_value: PositiveFloat | None = None
    """Clip range around the value predicted at rollout time; null does not clip."""

    def micro_batch_size(self, num_sequences: int) -> int:
        """Sequences in one forward (and backward) pass, for a rollout of `num_sequences`."""
        return math.ceil(num_sequences / (self.num_mini_batches * self.gradient_accumulation_steps))


# Policy and critic learn from one loss.
@dataclass(config=STRICT)
class JointCriticConfig(AlgorithmConfig):
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""


@dataclass(config=STRICT)
class GroupScaleConfig(AlgorithmConfig):
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What `grpo` divides by: the standard deviation of the prompt's completions, of the batch, or nothing."""


@dataclass(config=STRICT)
class GAEConfig(AlgorithmConfig):
    lam: UnitFloat = 0.95
    """GAE's weight of longer returns (Schulman et al., 2016)."""


# The critic is fitted by itself, after the policy's step.
@dataclass(config=STRICT)
class SeparateCriticConfig(GAEConfig):
    num_value_epochs: PositiveInt = 4
    """First-order epochs of the critic at `optim.value_learning_rate`."""


@dataclass(config=STRICT)
class ReinforceConfig(GroupScaleConfig, JointCriticConfig):
    """REINFORCE (Williams, 1992) with a baseline."""

    baseline: Literal["none", "batch-mean", "rloo", "grpo", "learned"] = "rloo"
    """The mean of the batch, of the prompt's other completions, of all of them (see scale_rewards); or a critic."""
    whiten_advantages: bool = False


@dataclass(config=STRICT)
class ActorCriticConfig(GAEConfig, JointCriticConfig):
    """Advantage actor-critic (Mnih et al., 2016); `optim.value_learning_rate` is the critic's rate."""

    n_steps: PositiveInt | None = None
    """Replace GAE by n-step returns: so many rewards, then the value function; 1 is the TD error."""
    vf_coef: NonNegativeFloat = 0.5


@dataclass(config=STRICT)
class PPOConfig(GroupScaleConfig, GAEConfig, JointCriticConfig):
    """Proximal policy optimization (Schulman et al., 2017)."""

    num_ppo_epochs: PositiveInt = 2
    adv_estimator: Literal["gae", "grpo", "rloo", "reinforce_plus_plus"] = "gae"
    """Only `gae` has a value function; the others compare with the prompt's other completions, or the batch."""
    whiten_advantages: bool | None = None
    """null whitens for gae and reinforce_plus_plus, as in their papers."""
    cliprange_value: PositiveFloat | None = 0.2
    clip_low: NonNegativeFloat = 0.2
    """Clip the probability ratio to [1 - clip_low, 1 + clip_high]."""
    clip_high: NonNegativeFloat = 0.2
    dual_clip: Annotated[FiniteFloat, Field(gt=1)] | None = None
    """Bound the loss of a negative advantage at this many times its size (Ye et al., 2020)."""
    ratio_level: Literal["token", "sequence", "sequence-geometric"] = "token"
    """One ratio a token, or one a sequence: the product, or the geometric mean (GSPO; Zheng et al., 2025)."""
    target_kl: PositiveFloat | None = None
    """End a rollout's epochs once approx_kl to the rollout policy (nats a token) exceeds this."""


@dataclass(config=STRICT)
class NPGConfig(SeparateCriticConfig):
    """Natural policy gradient (Kakade, 2001), with a step of a given KL."""

    max_kl: PositiveFloat = 0.01
    """Mean KL(old policy || new policy) of a step, in nats a token."""
    cg_iterations: PositiveInt = 10
    """Maximum number of conjugate-gradient iterations; each costs about two forward and backward passes."""
    cg_tolerance: NonNegativeFloat = 0.1
    """Stop the iterations once the residual is this share of the gradient's norm."""
    damping: PositiveFloat = 0.1
    """Added to the Fisher matrix's diagonal. With too little, the ratios of single tokens explode."""
    fisher_method: Literal["gauss_newton", "finite_difference"] = "gauss_newton"
    """Forward- and reverse-mode derivatives, or, for models without forward mode, differences of gradients."""
    fisher_fraction: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    """Share of the sequences that the Fisher matrix is computed over."""


@dataclass(config=STRICT)
class TRPOConfig(NPGConfig):
    """Trust region policy optimization (Schulman et al., 2015). No step's mean KL exceeds max_kl."""

    line_search_steps: PositiveInt = 10
    """Step lengths tried before the policy is left unchanged."""
    line_search_shrink: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 0.5
    """Factor from one step length to the next."""
    accept_ratio: UnitFloat = 0.1
    """Least share of the expected improvement that an accepted step must bring."""


@dataclass(config=STRICT)
class CPIConfig(SeparateCriticConfig):
    """Conservative policy iteration (Kakade & Langford, 2002)."""

    num_greedy_epochs: PositiveInt = 4
    """First-order epochs, without a clip, that make the approximately greedy policy."""
    step_size: Literal["held_out", "bound"] = "held_out"
    """Share of the greedy policy: the best on held-out sequences, or what the paper's bound allows (very small)."""
    held_out_fraction: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 0.25
    """Share of the sequences held out for `step_size: held_out`; the greedy policy learns from the others."""
    num_distill_epochs: PositiveInt = 4
    """First-order epochs that distill the mixture into one network."""
