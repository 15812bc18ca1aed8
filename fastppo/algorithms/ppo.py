"""Proximal policy optimization of a language model (Schulman et al., 2017, arXiv:1707.06347).

    r_t = π(a_t|s_t) / π_old(a_t|s_t)                                     the ratio to the policy that sampled
    A_t = Σ_l (γ λ)^l δ_{t+l},   δ_t = r'_t + γ V(s_{t+1}) − V(s_t)       GAE (Schulman et al., 2016, arXiv:1506.02438)
    L_policy = −min(r A, clip(r, 1 − clip_low, 1 + clip_high) A)          eq. 7; two bounds: DAPO (arXiv:2503.14476)
    L_value = ½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²),      R = A + V_old;  Baselines' clipped value loss
    loss = L_policy − entropy_coef · H[π] + vf_coef · L_value             eq. 9

with r' the reward of a token: the score at the last token, minus kl_coef · KL(π_old ‖ π_ref) at every token
(`Algorithm.shape_rewards`). Each rollout is used for `num_ppo_epochs` epochs of shuffled mini-batches.

Details, each an option of `fastppo.algorithms.config.PPOConfig`:

    dual_clip                 −max(min(r A, clip(r) A), dual_clip · A) where A < 0: Ye et al., 2020 (arXiv:1912.09729)
    ratio_level               one ratio a sequence: GSPO, Zheng et al., 2025 (arXiv:2507.18071)
    adv_estimator             without a critic: GRPO (arXiv:2402.03300), RLOO (2402.14740), REINFORCE++ (2501.03262)
    whiten_advantages         over the batch, as OpenAI Baselines does
    target_kl                 early stop of the epochs at this approx_kl, as OpenAI Spinning Up does
"""

from __future__ import annotations

from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm, policy_metrics
from fastppo.algorithms.config import PPOConfig
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.learner import Learner, StepOutput
from fastppo.algorithms.reinforce import reward_to_go, subtract_baseline
from fastppo.models.head import LMHead
from fastppo.ops.gae import gae
from fastppo.ops.linear_ppo_loss import linear_ppo_loss


class PPO(Algorithm):
    """Proximal policy optimization: epochs of −min(r A, clip(r, 1 − clip_low, 1 + clip_high) A) on each rollout."""

    config: PPOConfig

    @property
    def needs_values(self) -> bool:
        """Only GAE has a critic."""
        return self.config.adv_estimator == "gae"

    @property
    def whitens_advantages(self) -> bool:
        """As configured; if not given, as in the estimator's paper."""
        config = self.config
        if config.whiten_advantages is not None:
            return config.whiten_advantages
        by_objective = config.multi_objective_aggregation == "normalize_then_sum"
        return by_objective or config.adv_estimator in ("gae", "reinforce_plus_plus")

    @property
    def normalizes_advantages(self) -> bool:
        return self.config.adv_estimator == "grpo" and self.config.scale_rewards != "none"

    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor | None, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T] by the configured estimator, and the critic's targets; see `Algorithm.advantages_and_returns`."""
        config, mask = self.config, experience.mask
        if config.adv_estimator == "gae":
            return gae(rewards, values, gamma=config.gamma, lam=config.lam, mask=mask)
        # REINFORCE++ has no baseline; it whitens the rewards to go over the batch.
        baseline = "none" if config.adv_estimator == "reinforce_plus_plus" else config.adv_estimator
        returns = reward_to_go(rewards, mask, config.gamma)
        return subtract_baseline(returns, mask, experience.groups, baseline, config.scale_rewards), None

    def update(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """Epochs of mini-batches over one rollout, ended early at `target_kl`."""
        config = self.config
        return learner.descend(experience, self.loss, num_epochs=config.num_ppo_epochs, target_kl=config.target_kl)

    def policy_loss(self, batch: Experience, hidden: Tensor, head: LMHead, ref_head: LMHead | None) -> StepOutput:
        """L_policy − entropy_coef · H, with the clip; `Algorithm.loss`, which has the arguments, adds the critic's."""
        config = self.config
        policy = linear_ppo_loss(
            advantages=batch.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio_level=config.ratio_level,
            **self.loss_arguments(batch, hidden, head, ref_head),
        )
        metrics = policy_metrics(policy) | {"policy/clip_fraction": policy.metrics["clip_fraction"]}
        return StepOutput(policy.loss, metrics)
