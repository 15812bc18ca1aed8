"""The training loop: rollout, score, estimate, update; again.

    prompts ── sample ──> completions ── reward functions ──> scores
                  └─ one forward of policy, critic and reference ──> old log-probs, values, KL
    the algorithm: shaped rewards ──> advantages ── its update ──> parameters

What is in memory when a step begins, and nothing else, decides how the run goes on; a checkpoint is exactly that.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fastppo.algorithms import ALGORITHMS
from fastppo.algorithms.learner import Learner, NonFiniteError
from fastppo.models import ValueHead, load_tokenizer
from fastppo.models.policy_models import PolicyModels
from fastppo.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_same_run,
    discard_checkpoints,
    find_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
)
from fastppo.training.config import Config, ConfigError, check_consistency, to_dict
from fastppo.training.data import PromptSampler, load_prompts
from fastppo.training.device import choose_device
from fastppo.training.health import advantage_health, length_health, text_health
from fastppo.training.metrics import (
    ALARMS_FILE,
    METRICS_FILE,
    MetricsLogger,
    atomic_write,
    read_metrics,
    write_alarms,
    write_samples,
)
from fastppo.training.optim import build_optimizer, build_scheduler, scale_learning_rate
from fastppo.training.progress import ProgressDisplay
from fastppo.training.report import write_report
from fastppo.training.rewards import build_rewards
from fastppo.training.rng import rng_state, seed_everything, set_rng_state
from fastppo.training.scoring import Scorer
from fastppo.training.watch import Alarm, Watch, most_severe

CHECKPOINTS = "checkpoints"
FINAL = "final"


@dataclass
class TrainResult:
    """How a run ended."""

    step: int
    """Steps that are done."""
    interrupted_by: int | None
    """The signal that stopped the run after a whole step, or None."""
    report: Path
    final: Path | None
    """The final policy's folder, once every step is done."""
    stopped: str | None = None
    """The alarm that ended the run before its last step, or None."""


class Trainer:
    """Policy optimization of one language model, from a configuration.

    Args:
        config: the whole run.
        rewards: Python callables f(prompts, completions, **columns) to use instead of `config.rewards`.
        progress: where to show the run; a display on standard output if not given.
        resume: go on from the newest whole checkpoint in `config.output_dir`, to the same bits on a CPU.

    Raises:
        ConfigError, ModelError, DataError, RewardError, CheckpointError: something that was asked for cannot be had;
            one line that says what, before any work is done.
    """

    def __init__(
        self,
        config: Config,
        *,
        rewards: Sequence[Callable[..., Sequence[float]]] | None = None,
        progress: ProgressDisplay | None = None,
        resume: bool = False,
    ) -> None:
        if not (rewards or config.rewards):
            raise ConfigError("rewards: at least one is required (a list of {name, function} or {name, model})")
        check_consistency(config)
        self.config = config
        self.output_dir = Path(config.output_dir).expanduser()
        self.device = choose_device(config.device, config.backend_name)
        _check_writable(self.output_dir)
        checkpoint = self._open_output(resume)

        seed_everything(config.seed)
        self.tokenizer = load_tokenizer(config.model)
        self.rewards = build_rewards(rewards or config.rewards, device=self.device, model_defaults=config.model)
        self.algorithm = ALGORITHMS[config.algorithm](
            config.algorithm_config, temperature=config.rollout.temperature, backend=config.backend_name
        )
        by_objective = config.algorithm_config.multi_objective_aggregation == "normalize_then_sum"
        num_values = (len(self.rewards.rewards) if by_objective else None) if self.algorithm.needs_values else 0
        self.models = PolicyModels(config.model, device=self.device, num_values=num_values)
        self.data = load_prompts(
            config.data,
            self.tokenizer,
            context_length=self.models.context_length,
            max_new_tokens=config.rollout.max_new_tokens,
            allow_download=config.model.allow_download,
        )
        for prompts in (self.data.train, self.data.eval):
            self.rewards.check_columns({name for prompt in prompts for name in prompt.columns})
        self.sampler = PromptSampler(len(self.data.train), config.rollout.num_prompts, config.seed)
        self.scorer = Scorer(config, self.tokenizer, self.models, self.rewards)
        if self.scorer.held_out is not None:
            self.scorer.held_out.check_columns({name for prompt in self.data.eval for name in prompt.columns})
        self.watch = Watch(config.watch, held_out=[reward.name for reward in config.eval.rewards])
        self.policy_parameters = self.models.policy_parameters()
        self.value_parameters = self.models.value_parameters()
        self.optimizer = build_optimizer(config.optim, self.policy_parameters.values(), self.value_parameters.values())
        self.scheduler = build_scheduler(config.optim, self.optimizer, config.total_steps)
        self.learner = Learner(
            self.models,
            self.optimizer,
            partial(self.algorithm.part_weight, max_new_tokens=config.rollout.max_new_tokens),
            num_mini_batches=config.algorithm_config.num_mini_batches,
            micro_batch_size=self.scorer.micro_batch_size,
            max_grad_norm=config.optim.max_grad_norm,
            on_nonfinite=config.on_nonfinite,
            phase=lambda text: self.progress.phase(text),
            warn=lambda text: self.progress.print(text),
        )
        self.step = 0
        self._saved_step: int | None = None
        self._evaluated: set[int] = set()
        if checkpoint is not None:
            self._restore(checkpoint)
        self.progress = progress
        self._signal: int | None = None
        self._stopped: str | None = None
        # What a checkpoint of the steps that are done holds besides parameters and optimizer.
        self._between_steps = self._snapshot()

    # The run

    def train(self) -> TrainResult:
        """Run the steps that are left, with evaluation, checkpoints, samples and a report.

        SIGINT and SIGTERM let the current step finish, write a checkpoint and return; a second one stops at once.

        Raises:
            NonFiniteError: a NaN or Inf in a loss, gradient or probability, with `on_nonfinite: stop`.
            RewardError: a reward function failed. The steps before it are saved.
            CheckpointError: a checkpoint could not be written; older ones are whole.
        """
        config = self.config
        atomic_write(self.output_dir / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode())
        if self.progress is None:
            self.progress = ProgressDisplay(config.total_steps, start_step=self.step)
        resume_step = self.step if self._resumed else None
        with (
            MetricsLogger(self.output_dir, tensorboard=config.tensorboard, resume_step=resume_step) as logger,
            self._signals(),
            self.progress,
        ):
            if logger.earlier_run is not None:
                self.progress.print(f"what an earlier run left here was moved to {logger.earlier_run}")
            if self._nothing_to_resume:
                self.progress.print(f"no checkpoint in {self.output_dir} yet: starting from the beginning")
            for count, fate in ((self.data.num_dropped, "left out"), (self.data.num_truncated, "cut to their end")):
                if count:
                    self.progress.print(f"{count} prompts too long: {fate}")
            if self.step < config.total_steps and (self.watch.alarms or (self.output_dir / ALARMS_FILE).exists()):
                self._write_alarms()  # of the steps that are done, also where a killed run had gone on
            try:
                self._evaluate_if_due(logger)
                if self.step == 0 and self._saved_step is None and self.watch.good_steps:
                    self._checkpoint()  # trouble may come before the first regular one
                while self.step < config.total_steps and self._signal is None and self._stopped is None:
                    self._run_step(logger)
            except CheckpointError:
                raise
            except Exception:
                self._save_whole_steps()
                raise
            if (self._signal is not None or self._stopped is not None) and self._saved_step != self.step:
                self._checkpoint()
            final = None
            if self.step >= config.total_steps:
                self.progress.phase("saving")
                final = self.save_policy(self.output_dir / FINAL)
                self._evaluate_if_due(logger)
            self.progress.phase("report")
        interrupted_by, stopped = (None, None) if final else (self._signal, self._stopped)
        return TrainResult(self.step, interrupted_by, write_report(self.output_dir), final, stopped)

    def _run_step(self, logger: MetricsLogger) -> None:
        config = self.config
        began = time.perf_counter()
        self.learner.changed = False
        self.learner.where = f"step {self.step + 1}"
        try:
            metrics = self.train_step()
        except FloatingPointError as error:
            raise NonFiniteError(f"{self.learner.where}: {error}") from error
        except NonFiniteError as error:
            saved = "none" if self._saved_step is None else f"step {self._saved_step}"
            raise NonFiniteError(f"{error}; newest checkpoint: {saved}") from None
        self.step += 1
        metrics["time/step"] = time.perf_counter() - began
        metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["time/step"]
        metrics, alarms = self._watched(metrics)
        self._between_steps = self._snapshot()
        self.learner.changed = False
        logger.log(self.step, metrics)
        self.progress.update(self.step, metrics)
        last = self.step == config.total_steps
        # The evaluation comes before the checkpoint, so that a run that is killed after it has lost nothing; the last
        # one comes once the policy is saved.
        if self._act(alarms, logger) or (not last and self._evaluate_if_due(logger)):
            return
        if config.checkpoint.every and (self.step % config.checkpoint.every == 0 or last):
            self._checkpoint()

    def train_step(self) -> dict[str, float]:
        """One rollout and the updates made of it. Returns the step's metrics."""
        config = self.config
        metrics: dict[str, float] = {}
        with _clock(metrics, "rollout"):
            self.progress.phase("rollout")
            prompts = [self.data.train[index] for index in next(self.sampler)]
            prompts = [prompt for prompt in prompts for _ in range(config.rollout.num_generations)]
            rollout = self.scorer.sample(prompts)
        with _clock(metrics, "reward"):
            self.progress.phase("reward")
            rewards = self.scorer.reward(prompts, rollout)
        with _clock(metrics, "score"):
            self.progress.phase("score")
            experience = self.scorer.score(rollout, rewards)
            shaped = self.algorithm.estimate_advantages(experience)
        with _clock(metrics, "update"):
            updates = self.algorithm.update(self.learner, experience)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()

        sequence_kl = experience.kl.sum(1).mean().item() if experience.kl is not None else None
        metrics |= self.scorer.reward_metrics(rewards)
        metrics |= {f"multiplier/{name}": rewards.weights[name] for name in self.rewards.multipliers}
        metrics |= {name: value.item() for name, value in shaped.items()}
        metrics |= {
            "completion/length": rollout.mask.sum(1).float().mean().item(),
            "completion/ended": rollout.ended.float().mean().item(),
            "kl/coef": self.algorithm.kl_controller.value,
            "lr": learning_rate,
            "tokens": rollout.mask.sum().item(),
        }
        metrics |= text_health(rollout) | length_health(rollout) | advantage_health(experience)
        if sequence_kl is not None:
            metrics["kl/reference"] = sequence_kl
            metrics["kl/reference_per_token"] = (experience.kl.sum() / experience.mask.sum().clamp(min=1)).item()
            self.algorithm.kl_controller.update(sequence_kl, len(experience))
        refresh = config.algorithm_config.reference_refresh_steps
        if refresh and (self.step + 1) % refresh == 0:
            self.models.refresh_reference()
        return metrics | updates

    def _evaluate_if_due(self, logger: MetricsLogger) -> bool:
        """Evaluate before the first step, after the last, and every `eval.every`; each once, also across resumes.

        Returns:
            Whether the run was rolled back for what was found.
        """
        step, every = self.step, self.config.eval.every
        last = step == self.config.total_steps
        due = step == 0 or last or (every and step % every == 0)
        if not due or step in self._evaluated or not self.data.eval:
            return False
        self._evaluated.add(step)
        name = "before" if step == 0 else "after" if last else f"step-{step:06d}"
        self.progress.phase("evaluate")
        metrics, rows = self.scorer.evaluate(self.data.eval[: self.config.eval.num_prompts])
        metrics, alarms = self._watched(metrics)
        self._between_steps = self._snapshot()
        logger.log(self.step, metrics)
        write_samples(self.output_dir, name, rows[: self.config.eval.num_samples])
        kl = f", KL {metrics['eval/kl']:.3f}" if "eval/kl" in metrics else ""
        self.progress.print(
            f"{name}: held-out reward {metrics['eval/reward']:.3f}{kl}, length {metrics['eval/length']:.1f} "
            f"({len(rows)} prompts)"
        )
        return self._act(alarms, logger, over=last)

    # Trouble

    def _watched(self, metrics: dict[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """The metrics with what the watch adds to them, and the alarms they raise."""
        derived, alarms = self.watch.observe(self.step, metrics)
        if self.step == 1:
            for metric in self.watch.unseen():
                self.progress.print(f"watch: there is no metric {metric} so far, so its rule does nothing")
        counts = {"watch/alarms": len(alarms), "watch/rollbacks": self.watch.rollbacks}
        return metrics | derived | {name: count for name, count in counts.items() if count}, alarms

    def _act(self, alarms: list[Alarm], logger: MetricsLogger, *, over: bool = False) -> bool:
        """Carry out the most severe action of the alarms; only report them if the run is over.

        Returns:
            Whether the run was rolled back.
        """
        if not alarms:
            return False
        checkpoint = None
        action, outcome = most_severe(alarms), ""
        if over:
            action, outcome = "warn", "the run was over"
        elif action == "rollback":
            good_step = min(alarm.good_step for alarm in alarms if alarm.action == "rollback")
            checkpoint = find_checkpoint(self.output_dir / CHECKPOINTS, until=good_step)
            if self.watch.rollbacks >= self.config.watch.max_rollbacks:
                action, outcome = "stop", f"run stopped after {self.watch.rollbacks} rollbacks"
            elif checkpoint is None:
                action, outcome = "stop", f"run stopped: no checkpoint of step {good_step} or before to roll back to"
            else:
                outcome = (
                    f"rolled back to step {checkpoint.step}, with other random numbers and a learning rate times "
                    f"{self.config.watch.lr_factor:g}"
                )
        elif action == "lower_lr":
            outcome = f"learning rate times {self.config.watch.lr_factor:g}"
        elif action == "stop":
            outcome = "run stopped"
        for alarm in alarms:
            alarm.outcome = "warned" if alarm.action == "warn" else outcome
            self.progress.print(f"step {alarm.step}: {alarm.reason}: {alarm.outcome}")
        if action == "rollback":
            self._roll_back(checkpoint, logger)
        elif action == "lower_lr":
            self.watch.lr_scale *= self.config.watch.lr_factor
            scale_learning_rate(self.optimizer, self.scheduler, self.config.watch.lr_factor)
        elif action == "stop":
            self._stopped = next(alarm.reason for alarm in alarms if alarm.action != "warn")
        self._between_steps = self._snapshot()
        self._write_alarms()
        return action == "rollback"

    def _roll_back(self, checkpoint: Checkpoint, logger: MetricsLogger) -> None:
        """Go on from an earlier checkpoint, with other random numbers and a lower learning rate.

        Prompts come in the order they would have come in anyway; what is sampled for them differs. A kill at any
        instant here leaves checkpoints from which the run comes to this rollback again, or one that has it behind it.
        """
        logger.keep_aside(checkpoint.step, self.watch.rollbacks + 1)
        before = self.watch.state_dict()
        self._restore(checkpoint)
        scale_learning_rate(self.optimizer, self.scheduler, self.watch.rolled_back(before, self.config.watch.lr_factor))
        digest = hashlib.sha256(f"{self.config.seed}/rollback {self.watch.rollbacks}".encode()).digest()
        seed_everything(int.from_bytes(digest[:8], "little"))
        self._between_steps = self._snapshot()
        self.learner.changed = False
        discard_checkpoints(self.output_dir / CHECKPOINTS, after=checkpoint.step)
        self._checkpoint()
        logger.rewind(checkpoint.step)

    def _write_alarms(self) -> None:
        write_alarms(self.output_dir, [dataclasses.asdict(alarm) for alarm in self.watch.alarms])

    # Saving

    def save_policy(self, folder: Path) -> Path:
        """Write a plain folder that transformers loads: the policy (adapters merged), its tokenizer and its critic."""
        temporary = folder.with_name(f".saving-{folder.name}")
        _remove(temporary)
        policy = self.models.policy
        if self.config.model.lora is not None:
            policy = copy.deepcopy(policy).merge_and_unload()
        policy.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        if self.models.value is not None:
            value_folder = temporary if isinstance(self.models.value, ValueHead) else temporary / "value"
            self.models.value.save_pretrained(value_folder)
        if folder.exists():
            replaced = folder.with_name(f".replaced-{folder.name}")
            _remove(replaced)
            folder.rename(replaced)
            temporary.rename(folder)
            _remove(replaced)
        else:
            temporary.rename(folder)
        return folder

    def _snapshot(self) -> dict[str, Any]:
        """Everything but parameters and optimizer states, by value: what the next step starts from."""
        tensors, generators = rng_state()
        return {
            "rng": tensors,
            "state": copy.deepcopy(
                {
                    "rng": generators,
                    "sampler": self.sampler.state_dict(),
                    "algorithm": self.algorithm.state_dict(),
                    "rewards": self.rewards.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "watch": self.watch.state_dict(),
                }
            ),
        }

    def _checkpoint(self) -> None:
        self.progress.phase("checkpoint")
        optimizer, optimizer_meta = optimizer_tensors(self.optimizer)
        save_checkpoint(
            self.output_dir / CHECKPOINTS,
            self.step,
            tensors={
                **self._saved_parameters(),
                "optimizer": optimizer,
                "rng": self._between_steps["rng"],
            },
            state=self._between_steps["state"] | {"optimizer": optimizer_meta},
            config=to_dict(self.config),
            keep_last=self.config.checkpoint.keep_last,
            keep_for=self.watch.good_steps,
        )
        self._saved_step = self.step

    def _saved_parameters(self) -> dict[str, dict[str, Tensor]]:
        """The parameters that a checkpoint holds, by group and name."""
        groups = {"policy": self.policy_parameters}
        if self.value_parameters:
            groups["value"] = self.value_parameters
        if self.config.algorithm_config.reference_refresh_steps:
            groups["reference"] = self.models.reference_parameters()
        return {group: {name: p.detach() for name, p in parameters.items()} for group, parameters in groups.items()}

    def _save_whole_steps(self) -> None:
        """On the way out of a step that failed before it changed any parameter: keep what the steps before it made."""
        if self.learner.changed or self.step in (0, self._saved_step):
            return
        if all(torch.isfinite(parameter).all() for parameter in self.learner.parameters().values()):
            self._checkpoint()
            self.progress.print(f"saved a checkpoint of step {self.step}")

    def _open_output(self, resume: bool) -> Checkpoint | None:
        """The checkpoint to go on from; refuses to mix two runs in one folder."""
        root = self.output_dir / CHECKPOINTS
        self._resumed = self._nothing_to_resume = False
        if not resume:
            if any(root.glob("step-*")) or (self.output_dir / FINAL).exists():
                raise CheckpointError(
                    f"{self.output_dir}: holds an earlier run; go on with --resume, or choose another --output_dir"
                )
            return None
        checkpoint = find_checkpoint(root)
        if checkpoint is None and any(root.glob("step-*")):
            raise CheckpointError(f"{root}: none of the checkpoints is whole; start a new run with another output_dir")
        if checkpoint is not None:
            check_same_run(checkpoint.config, to_dict(self.config))
            self._resumed = True
        self._nothing_to_resume = checkpoint is None
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        for group, parameters in self._saved_parameters().items():
            saved = checkpoint.tensors(group)
            if saved.keys() != parameters.keys():
                raise CheckpointError(f"{checkpoint.path}: the {group}'s parameters are not those of this model")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])
        state = checkpoint.state
        load_optimizer(self.optimizer, checkpoint.tensors("optimizer"), state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.sampler.load_state_dict(state["sampler"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.rewards.load_state_dict(state["rewards"])
        self.watch.load_state_dict(state["watch"])
        set_rng_state(checkpoint.tensors("rng"), state["rng"])
        self.step = self._saved_step = checkpoint.step
        metrics = self.output_dir / METRICS_FILE
        rows = read_metrics(metrics) if metrics.exists() else []
        self._evaluated = {row["step"] for row in rows if "eval/reward" in row and row["step"] <= self.step}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for an end after this step; the second is the usual one."""

        def ask(number: int, frame: Any) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number
            self.progress.print("stopping after this step (once more to stop at once)")

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written to ({error.strerror})") from None


@contextmanager
def _clock(metrics: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    metrics[f"time/{name}"] = time.perf_counter() - began


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
