"""The algorithms' sections of the configuration."""

from __future__ import annotations

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
    """What every algorithm has: shaping of rewards, control of the KL to the reference, and how terms are averaged."""

    num_mini_batches: PositiveInt = 1
    """Optimizer steps in an epoch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward and backward passes in an optimizer step."""
    loss_agg: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    entropy_coef: FiniteFloat = 0.0
    gamma: UnitFloat = 1.0
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    kl_coef: NonNegativeFloat = 0.05
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty shapes the per-token rewards or is a term of the loss."""
    kl_controller: Literal["fixed", "adaptive", "linear"] = "fixed"
    """`adaptive` steers the KL to kl_target; `linear` moves kl_coef to kl_coef_final over kl_horizon completions."""
    kl_target: PositiveFloat = 6.0
    """The adaptive controller's target, in nats a completion (Ziegler et al., 2019)."""
    kl_horizon: PositiveInt = 10000
    """In completions: the adaptive controller's time constant, or the length of the linear schedule."""
    kl_coef_final: NonNegativeFloat = 0.0
    """Where the linear schedule ends."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Of several rewards: advantages of their weighted sum, or the weighted sum of each one's normalized advantages,
    with a value function for each (for groups: GDPO; Liu et al., 2026)."""
    reference_refresh_steps: NonNegativeInt = 0
    """Every so many steps the reference becomes the current policy; 0 keeps the policy as it was at the start."""
    missing_eos_penalty: NonNegativeFloat | None = None
    """Subtracted from the score of a completion that was cut at max_new_tokens."""
    length_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score for every token of a completion."""
    reward_clip: PositiveFloat | None = None
    """Clip the total score to [-reward_clip, reward_clip]."""


@dataclass(config=STRICT)
class CriticConfig(AlgorithmConfig):
    """What algorithms that may learn a value function add."""

    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    cliprange_value: PositiveFloat | None = None
    """Clip range around the value predicted at rollout time."""


@dataclass(config=STRICT)
class ReinforceConfig(CriticConfig):
    """REINFORCE (Williams, 1992) with a baseline."""

    baseline: Literal["none", "batch-mean", "rloo", "grpo", "learned"] = "rloo"
    """`rloo`: the mean of the prompt's other completions. `grpo`: that of all of them, over their deviation.
    `learned`: a value function."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What `grpo` divides by: the standard deviation of the prompt's completions, of the batch, or none."""
    whiten_advantages: bool = False


@dataclass(config=STRICT)
class ActorCriticConfig(CriticConfig):
    """Advantage actor-critic (Mnih et al., 2016); `optim.value_learning_rate` is the critic's rate."""

    lam: UnitFloat = 0.95
    """GAE's weight of longer returns (Schulman et al., 2016)."""
    n_steps: PositiveInt | None = None
    """Rewards that are seen before the value function takes over; 1 is the TD error. Takes GAE's place."""
    vf_coef: NonNegativeFloat = 0.5


@dataclass(config=STRICT)
class PPOConfig(CriticConfig):
    """Proximal policy optimization (Schulman et al., 2017)."""

    num_ppo_epochs: PositiveInt = 2
    adv_estimator: Literal["gae", "grpo", "rloo", "reinforce_plus_plus"] = "gae"
    """All but `gae` do without a value function: they compare with the prompt's other completions, or the batch."""
    lam: UnitFloat = 0.95
    """GAE's weight of longer returns (Schulman et al., 2016)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What `grpo` divides by: the standard deviation of the prompt's completions, of the batch, or none."""
    whiten_advantages: bool | None = None
    """If not given: for gae and reinforce_plus_plus, as in their papers."""
    cliprange_value: PositiveFloat | None = 0.2
    clip_low: NonNegativeFloat = 0.2
    clip_high: NonNegativeFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    ratio_level: Literal["token", "sequence", "sequence-geometric"] = "token"
    importance_sampling_cap: PositiveFloat | None = None
    """Weigh each token by min(its probability when scored / when sampled, this): where sampling rounds otherwise than
    scoring, or is another engine's. Not given: no weights (truncated importance sampling)."""
    target_kl: PositiveFloat | None = None
    """Stop a step's epochs once approx_kl to the rollout policy (nats a token) passes this."""


@dataclass(config=STRICT)
class NPGConfig(AlgorithmConfig):
    """Natural policy gradient (Kakade, 2001), with a step of a given KL."""

    max_kl: PositiveFloat = 0.01
    """The step's mean KL(old policy || new policy), nats a token."""
    cg_iterations: PositiveInt = 10
    """Most Fisher-vector products for one solution; each costs about two forward and backward passes."""
    cg_tolerance: NonNegativeFloat = 0.1
    """Stop earlier once the residual is this small a share of the gradient."""
    damping: PositiveFloat = 0.1
    """Added to the Fisher matrix's diagonal. With too little, the Fisher matrix of few sequences leaves directions free
    in which single tokens' ratios explode."""
    fisher_method: Literal["gauss_newton", "finite_difference"] = "gauss_newton"
    """Forward- and reverse-mode derivatives, or differences of gradients, for models without forward mode."""
    fisher_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the sequences that the Fisher matrix is taken over."""
    preconditioner: Literal["none", "diagonal"] = "none"
    """`diagonal`: an estimate of the Fisher matrix's diagonal."""
    preconditioner_probes: PositiveInt = 8
    """Backward passes that the estimate is made of."""
    vector_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the four vectors of conjugate gradients; `auto` is the parameters' own."""
    vector_device: Literal["auto", "cpu"] = "auto"
    """Where they are kept; `auto` is where the parameters are."""
    num_value_epochs: PositiveInt = 4
    """Of the critic, which learns by first-order steps at `optim.value_learning_rate`."""
    lam: UnitFloat = 0.95
    """GAE's weight of longer returns (Schulman et al., 2016)."""
    cliprange_value: PositiveFloat | None = None
    """Clip range around the value predicted at rollout time."""


@dataclass(config=STRICT)
class TRPOConfig(NPGConfig):
    """Trust region policy optimization (Schulman et al., 2015). No step's mean KL is above max_kl."""

    line_search_steps: PositiveInt = 10
    """Step lengths that are tried before the policy is left as it is."""
    line_search_shrink: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of one such length to the one before."""
    accept_ratio: UnitFloat = 0.1
    """The share of the improvement to be expected that a step must really bring."""


@dataclass(config=STRICT)
class CPIConfig(AlgorithmConfig):
    """Conservative policy iteration (Kakade & Langford, 2002)."""

    num_greedy_epochs: PositiveInt = 4
    """First-order epochs, without a clip, that make the approximately greedy policy."""
    step_size: Literal["held_out", "bound"] = "held_out"
    """Its share in the mixture: the best on held-out sequences, or what the paper's bound guarantees (very small)."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of the sequences, for `held_out`; the greedy policy learns from the others."""
    num_distill_epochs: PositiveInt = 4
    """First-order epochs that turn the mixture of two networks into one."""
    num_value_epochs: PositiveInt = 4
    """Of the critic, which learns by first-order steps at `optim.value_learning_rate`."""
    lam: UnitFloat = 0.95
    """GAE's weight of longer returns (Schulman et al., 2016)."""
    cliprange_value: PositiveFloat | None = None
    """Clip range around the value predicted at rollout time."""
