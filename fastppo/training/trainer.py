"""The training loop: rollout, scores, advantages, update; evaluations, alarms and checkpoints between steps.

    prompts ── sample ──> completions ── reward functions ──> scores
                  └─ one forward of policy, critic and reference ──> old log-probs, values, KL
    the algorithm: shaped rewards ──> advantages ── its update ──> parameters

A checkpoint holds all state that a step starts from, so a resumed run continues exactly as if never stopped.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import math
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
from torch import Tensor, nn

from fastppo.algorithms import ALGORITHMS
from fastppo.algorithms.learner import Learner, NonFiniteError
from fastppo.errors import quote
from fastppo.extras import install_command
from fastppo.models.adapters import VALUE, merge_lora, save_adapters
from fastppo.models.policy_models import PolicyModels
from fastppo.models.quantize import check_bitsandbytes
from fastppo.rollout.prompt import Prompt
from fastppo.rollout.vllm import check_vllm
from fastppo.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_like,
    discard_checkpoints,
    find_checkpoint,
    restoring,
    save_checkpoint,
)
from fastppo.training.config import Config, ConfigError, check_consistency, to_dict
from fastppo.training.config_resume import check_same_run
from fastppo.training.data import PromptSampler
from fastppo.training.device import busy_machine, choose_device
from fastppo.training.distributed import connect, open_ranks, rank_device
from fastppo.training.files import atomic_folder, atomic_write, delete_temporary, naming
from fastppo.training.health import advantage_health, length_health, text_health
from fastppo.training.inputs import Inputs
from fastppo.training.lock import FolderLock
from fastppo.training.metrics import (
    ALARMS_FILE,
    METRICS_FILE,
    SAMPLES_FOLDER,
    MetricsLogger,
    read_metrics,
    samples_name,
    write_alarms,
    write_samples,
)
from fastppo.training.optim import (
    build_optimizer,
    build_scheduler,
    load_optimizer,
    optimizer_tensors,
    parameter_of_state,
    scale_learning_rate,
)
from fastppo.training.progress import ProgressDisplay
from fastppo.training.report import PLOTS_FOLDER, write_report
from fastppo.training.rng import rng_state, seed_everything, set_rng_state
from fastppo.training.scoring import Scorer, with_prompt
from fastppo.training.silent import Silent
from fastppo.training.trackers import Trackers, load_trackers
from fastppo.training.watch import Alarm, Watch, most_severe

CHECKPOINTS = "checkpoints"
FINAL = "final"
STATEFUL = ("sampler", "algorithm", "rewards", "scheduler", "watch")
"""The trainer's attributes whose `state_dict` a checkpoint holds."""
OVER = "the run was over"
"""Outcome of an alarm of the last evaluation."""


@dataclass
class TrainResult:
    """How a run ended."""

    step: int  # number of completed steps
    interrupted_by: int | None  # the signal that stopped the run
    report: Path
    final: Path | None  # folder of the final policy; None if steps remain
    stopped: str | None = None  # the alarm that stopped the run


class Trainer:
    """Train one language model by policy optimization, from a configuration.

    Args:
        config: the run's configuration.
        rewards: Python callables f(prompts, completions, **columns) to use instead of `config.rewards`.
        progress: the progress display; by default one on standard output.
        resume: continue from the newest undamaged checkpoint in `config.output_dir`; bit-identical on a CPU.

    From here to the end of `train`, no other run can use `config.output_dir`.

    Raises:
        ConfigError, ModelError, DataError, RewardError, CheckpointError: the configuration cannot be run. The message
            is one line; no training has been done.
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
        self._busy = busy_machine()  # before this run's own load counts
        load_trackers(config.report_to)
        self.config, self.progress, self._resume = config, progress, resume
        connect()
        self.device = rank_device(choose_device(config.device, config.backend_name))
        _check_packages(config)
        self.ranks = open_ranks(config, self.device)
        self.ranks.check_equal({"resume": resume}, "give it to all processes or to none")
        self.output_dir, self._lock = Path(config.output_dir).expanduser(), Silent()
        if self.ranks.rank != 0:
            self.progress = Silent()
        with self.ranks.agreed():
            if self.ranks.rank == 0:
                self.output_dir, self._lock = _lock_output_dir(config.output_dir)
        try:
            self._build(rewards)
        except BaseException:
            self._lock.release()
            raise

    def _build(self, rewards: Sequence[Callable[..., Sequence[float]]] | None) -> None:
        """Load and build all that a run needs, and restore the checkpoint that it goes on from."""
        config = self.config
        checkpoint = self._find_checkpoint()
        with self.ranks.agreed():
            seed_everything(config.seed)
            inputs = Inputs(config, device=self.device, rewards=rewards)
        self.ranks.check_equal(inputs.facts(), "all ranks must read the same")
        self.tokenizer, self.rewards, self.data = inputs.tokenizer, inputs.rewards, inputs.data
        self.algorithm = ALGORITHMS[config.algorithm](
            config.algorithm_config, temperature=config.rollout.temperature, backend=config.backend_name
        )
        by_objective = config.algorithm_config.multi_objective_aggregation == "normalize_then_sum"
        num_values = (len(self.rewards.rewards) if by_objective else None) if self.algorithm.needs_values else 0
        load, place = self.ranks.load, self.ranks.place
        self.models = PolicyModels(config.model, device=self.device, num_values=num_values, load=load, place=place)
        self.scorer = Scorer(
            config,
            self.tokenizer,
            self.models,
            self.rewards,
            self.algorithm,
            ranks=self.ranks,
            held_out=inputs.held_out,
            texts=inputs.texts,
        )
        self.sampler = PromptSampler(len(self.data.train), config.rollout.num_prompts, config.seed)
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
            max_tokens=config.batch.max_tokens,
            max_grad_norm=config.optim.max_grad_norm,
            on_nonfinite=config.on_nonfinite,
            ranks=self.ranks,
            phase=lambda text: self.progress.phase(text),
            warn=lambda text: self.progress.print(text),
        )
        self.step, self._saved_step = 0, None
        self._behind = False  # whether the checkpoint that is resumed lacks the evaluation of its step
        self._evaluated: set[int] = set()
        self._asked, self._asked_at = None, math.inf  # the first signal that this process got, and when
        self._phase_name = "rollout"  # of the step
        self._signal = self._stopped = None  # what ends the run before its last step
        # While a step or an evaluation runs, the state before it: what a checkpoint holds if it fails.
        self._step_start: dict[str, Any] | None = None
        self._owed = [] if checkpoint is None else self._restore(checkpoint)

    # The run

    def train(self) -> TrainResult:
        """Run the remaining steps, with evaluations, checkpoints, samples and a report.

        On SIGINT or SIGTERM the current step finishes, a checkpoint is written, and this returns; a second signal
        stops at once.

        Raises:
            NonFiniteError: a number is NaN or infinite, with `on_nonfinite: stop`, or a parameter is. Completed steps
                are saved.
            RewardError: a reward function failed. Completed steps are saved.
            CheckpointError: a checkpoint could not be written; older ones are intact.
        """
        with self._lock:
            return self._train()

    def _train(self) -> TrainResult:
        config = self.config
        if self.progress is None:
            self.progress = ProgressDisplay(config.total_steps, start_step=self.step)
        self.trackers = logger = Silent()
        with self.ranks.agreed():
            if self.ranks.rank == 0:
                logger = self._open_folder()
        with logger, self._signals(), self.progress:
            self._print_notices(logger.earlier_run)
            act, self._owed = self._decide(self._owed, logger), []
            if self.step < config.total_steps and (self.watch.alarms or (self.output_dir / ALARMS_FILE).exists()):
                self._write_alarms()  # a killed run may have written alarms of later steps
            final = None
            try:
                if not act():
                    self._evaluate_if_due(logger)
                first = self.step == 0 and self._saved_step is None
                if (first and self.watch.good_steps) or (self._behind and self.step < config.total_steps):
                    self._checkpoint()  # a rollback, or the next resume, may need it before the next regular one
                while self.step < config.total_steps and self._stopped is None and not self._interrupted():
                    self._run_step(logger)
                self._check_parameters()
                if (self._signal is not None or self._stopped is not None) and self._saved_step != self.step:
                    self._checkpoint()
                if self.step >= config.total_steps:
                    self.progress.phase("saving")
                    final = self.save_policy(self.output_dir / FINAL)
                    self._evaluate_if_due(logger)
            except Exception as error:
                error.phase = self._phase_name
                # Else the others do not know of it, and are elsewhere.
                together = self.ranks.size == 1 or hasattr(error, "rank") or isinstance(error, NonFiniteError)
                if together and not isinstance(error, CheckpointError):
                    self._save_completed_steps()
                if isinstance(error, NonFiniteError):
                    saved = "none" if self._saved_step is None else f"step {self._saved_step}, for --resume"
                    raise NonFiniteError(f"{error}; newest checkpoint: {saved}") from error
                raise
            self.progress.phase("report")
        interrupted_by, stopped = (None, None) if final else (self._signal, self._stopped)
        report = self.ranks.first(lambda: write_report(self.output_dir))
        return TrainResult(self.step, interrupted_by, report, final, stopped)

    def _open_folder(self) -> MetricsLogger:
        """Clear up what a killed run has left, write the configuration, and begin to log."""
        config = self.config
        for folder in ("", SAMPLES_FOLDER, PLOTS_FOLDER, CHECKPOINTS):
            delete_temporary(self.output_dir / folder)
        atomic_write(self.output_dir / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode())
        self.trackers = Trackers(
            config.report_to,
            self.output_dir,
            project=config.project,
            run_name=config.run_name or self.output_dir.resolve().name,
            config=to_dict(config),
            warn=self.progress.print,
        )
        return MetricsLogger(self.output_dir, resume_step=self._saved_step, trackers=self.trackers)

    def _interrupted(self) -> bool:
        """Whether a signal, or the end of torchrun, ends the run, on whichever rank it came."""
        orphaned = signal.SIGTERM if self.ranks.orphaned() else None
        self._signal = next(filter(None, self.ranks.each(lambda: self._asked or orphaned)), None)
        return self._signal is not None

    def _print_notices(self, earlier_run: Path | None) -> None:
        if self.watch.alarms:
            self.progress.note({"alarms": len(self.watch.alarms)})
        for row in read_metrics(self.output_dir / METRICS_FILE):
            self.progress.note({name: value for name, value in row.items() if name == "eval/reward"})
        if self._busy is not None:
            self.progress.print(self._busy)
        if earlier_run is not None:
            self.progress.print(f"moved the files of an earlier run to {earlier_run}")
        if self._resume and self._saved_step is None:
            self.progress.print(f"no checkpoint in {self.output_dir} yet: starting from the beginning")
        for count, fate in ((self.data.num_dropped, "dropped"), (self.data.num_truncated, "truncated on the left")):
            if count:
                self.progress.print(f"{count} prompts too long: {fate}")

    def _run_step(self, logger: MetricsLogger) -> None:
        config = self.config
        with self.ranks.agreed():
            self._lock.acquire()  # somebody may have deleted its file, and a second run begun
        began = time.perf_counter()
        self._step_start = self._state()
        metrics = self.train_step()
        metrics["time/step"] = time.perf_counter() - began
        metrics["tokens_per_second"] = metrics.pop("tokens") / metrics["time/step"]
        metrics = self.ranks.first(lambda: metrics)  # times differ, and rules of the watch may bound them
        metrics, act = self._log(self.step + 1, metrics, logger)
        self.step, self._step_start = self.step + 1, None
        self.progress.update(self.step, metrics)
        last = self.step == config.total_steps
        # The evaluation precedes the checkpoint, so that a run killed after it repeats neither. The last evaluation
        # follows the saving of the policy.
        if act() or (not last and self._evaluate_if_due(logger)):
            return
        if config.checkpoint.every and (self.step % config.checkpoint.every == 0 or last):
            self._checkpoint()

    def train_step(self) -> dict[str, float]:
        """Run one rollout and the updates from it. Returns the step's metrics."""
        config = self.config
        self.learner.changed, self.learner.where = False, f"step {self.step + 1}"
        controllers = {part: copy.deepcopy(part.state_dict()) for part in (self.rewards, self.algorithm)}
        prompts = [self.data.train[index] for index in next(self.sampler)]
        prompts = [prompt for prompt in prompts for _ in range(config.rollout.num_generations)]
        try:
            metrics = self._rollout_and_update(prompts)
        except FloatingPointError as error:  # one before the update; the learner deals with those in it
            what = f"{self._phase_name}: {with_prompt(error, prompts)}"
            if self.learner.changed:
                raise NonFiniteError(f"{self.learner.where}, {what}") from error
            self.learner.skip_nonfinite(what, "this step")
            for part, state in controllers.items():
                part.load_state_dict(state)
            self.models.drop_kept_pass()
            metrics = {"policy/skipped_steps": 1.0, "tokens": 0}
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        self.learner.changed = True  # what follows is this step's as well, of which an earlier checkpoint must not know
        self.scheduler.step()
        refresh = config.algorithm_config.reference_refresh_steps
        if refresh and (self.step + 1) % refresh == 0:
            self.models.refresh_reference()
        return metrics

    def _rollout_and_update(self, prompts: list[Prompt]) -> dict[str, float]:
        """A step on these prompts, each as often as it is to be completed. Returns metrics.

        Raises:
            FloatingPointError: something that the update needs is not finite.
        """
        metrics: dict[str, float] = {}
        with self._phase("rollout", metrics):
            name = f"rollback {self.watch.rollbacks}/step {self.step + 1}"
            rollout = self.scorer.sample(
                prompts, name, lambda ended: self.progress.phase(f"rollout {ended / len(prompts):.0%}")
            )
        with self._phase("reward", metrics):
            rewards = self.scorer.reward(prompts, rollout)
        with self._phase("score", metrics):
            experience = self.scorer.score(rollout, rewards)
            shaped = self.algorithm.estimate_advantages(experience)
        with self._phase("update", metrics):
            updates = self.algorithm.update(self.learner, experience)

        controller = self.algorithm.kl_controller
        metrics |= self.scorer.reward_metrics(rewards) | self.scorer.rollout_metrics(experience)
        metrics |= {f"multiplier/{name}": rewards.weights[name] for name in self.rewards.multipliers}
        metrics |= {name: value.item() for name, value in shaped.items()}
        metrics |= {
            "completion/length": rollout.mask.sum(1).float().mean().item(),
            "completion/ended": rollout.ended.float().mean().item(),
            "kl/coef": controller.value,
            "tokens": rollout.mask.sum().item(),
        }
        metrics |= text_health(rollout) | length_health(rollout) | advantage_health(experience)
        if experience.kl is not None:
            kl = experience.kl.double().sum()
            metrics["kl/reference"] = (kl / len(experience)).item()
            metrics["kl/reference_per_token"] = (kl / experience.mask.sum().clamp(min=1)).item()
            try:
                controller.update(metrics["kl/reference"], len(experience))
            except FloatingPointError as error:
                self.learner.skip_nonfinite(str(error), "this update of kl_coef")
        return metrics | updates

    @contextmanager
    def _phase(self, name: str, metrics: dict[str, float]) -> Iterator[None]:
        """Show a phase of the step and measure its seconds."""
        self.progress.phase(name)
        self._phase_name = name
        began = time.perf_counter()
        yield
        metrics[f"time/{name}"] = time.perf_counter() - began

    def _evaluate_if_due(self, logger: MetricsLogger) -> bool:
        """Evaluate before the first step, after the last, and every `eval.every`; each once, also across resumes.

        Returns:
            Whether the run was rolled back because of the result.
        """
        step, every = self.step, self.config.eval.every
        last = step == self.config.total_steps
        due = step == 0 or last or (every and step % every == 0)
        if not due or step in self._evaluated or not self.data.eval:
            return False
        # A failure from here to the row is as if there had been no evaluation; see `_save_completed_steps`.
        self._step_start, self.learner.changed = self._state(), False
        name = samples_name(step, self.config.total_steps)
        try:
            metrics, rows = self.scorer.evaluate(self.data.eval[: self.config.eval.num_prompts], self.progress.phase)
        except NonFiniteError as error:
            self.learner.where = f"after step {step}"
            self.learner.skip_nonfinite(str(error), "this evaluation")
            metrics, rows = {"eval/reward": math.nan, "eval/skipped": 1.0}, []
        samples = rows[: self.config.eval.num_samples]
        if samples:
            self.ranks.first(lambda: write_samples(self.output_dir, name, samples))
        # The row follows the samples and the alarms: it says that the evaluation was done.
        metrics, act = self._log(step, metrics, logger, over=last)
        self.trackers.samples(step, samples)
        self._evaluated.add(step)
        self._step_start = None
        if samples:
            self.progress.note(metrics)
            kl = f", KL {metrics['eval/kl']:.3f}" if "eval/kl" in metrics else ""
            self.progress.print(
                f"{name}: held-out reward {metrics['eval/reward']:.3f}{kl}, length {metrics['eval/length']:.1f} "
                f"({len(rows)} prompts)"
            )
        return act()

    # Alarms

    def _log(
        self, step: int, metrics: dict[str, float], logger: MetricsLogger, *, over: bool = False
    ) -> tuple[dict[str, float], Callable[[], bool]]:
        """Log metrics with those that the watch derives from them, after the alarms that they raise.

        Args:
            over: the run has ended, so alarms are only reported.

        Returns:
            All metrics, and a function that does what the alarms ask for and returns whether it rolled the run back.
        """
        derived, alarms = self.watch.observe(step, metrics)
        if step == 1:
            for metric in self.watch.unseen():
                self.progress.print(f"watch: there is no metric {metric} so far, so its rule has no effect")
        counts = {"watch/alarms": len(alarms), "watch/rollbacks": self.watch.rollbacks}
        metrics = metrics | derived | {name: count for name, count in counts.items() if count}
        act = self._decide(alarms, logger, over=over)
        with self.ranks.agreed():
            if alarms:
                self._write_alarms()
            logger.log(step, metrics)
        return metrics, act

    def _decide(self, alarms: list[Alarm], logger: MetricsLogger, *, over: bool = False) -> Callable[[], bool]:
        """Choose the most severe action that the alarms ask for and write its outcome into them; see `_log`."""
        action, outcome, factor = most_severe(alarms), "run stopped", self.config.watch.lr_factor
        checkpoint = None
        if over:
            action, outcome = "warn", OVER
        elif action == "lower_lr":
            outcome = f"learning rate times {factor:g}"
        elif action == "rollback":
            good_step = min(alarm.good_step for alarm in alarms if alarm.action == "rollback")
            if self.watch.rollbacks >= self.config.watch.max_rollbacks:
                action, outcome = "stop", f"run stopped after {self.watch.rollbacks} rollbacks"
            elif checkpoint := self._find_good(good_step):
                changes = f"other random numbers and a learning rate times {factor:g}"
                outcome = f"rolled back to step {checkpoint.step}, with {changes}"
            else:
                action, outcome = "stop", f"run stopped: no checkpoint of step {good_step} or before to roll back to"
        for alarm in alarms:
            alarm.outcome = "warned" if alarm.action == "warn" else outcome

        def act() -> bool:
            for alarm in alarms:
                self.progress.print(f"step {alarm.step}: {alarm.reason}: {alarm.outcome}")
                self.progress.note({"alarms": len(self.watch.alarms)})
            if action == "lower_lr":
                self.watch.lr_scale *= factor
                scale_learning_rate(self.optimizer, self.scheduler, factor)
            elif action == "rollback":
                self._roll_back(checkpoint, logger)
            elif action == "stop":
                self._stopped = next(alarm.reason for alarm in alarms if alarm.action != "warn")
            return action == "rollback"

        return act

    def _find_good(self, step: int) -> Checkpoint | None:
        try:
            return find_checkpoint(self.output_dir / CHECKPOINTS, until=step, ranks=self.ranks)
        except CheckpointError as error:
            self.progress.print(str(error))
            return None

    def _roll_back(self, checkpoint: Checkpoint, logger: MetricsLogger) -> None:
        """Restore an earlier checkpoint and continue with other random numbers and a lower learning rate.

        The order of prompts is unchanged; the completions sampled for them differ. If the process is killed meanwhile,
        the resumed run either repeats this rollback or starts after it.
        """
        with self.ranks.agreed():
            logger.keep_aside(checkpoint.step, self.watch.rollbacks + 1)
        before = self.watch.state_dict()
        self._restore(checkpoint)
        scale_learning_rate(self.optimizer, self.scheduler, self.watch.rolled_back(before, self.config.watch.lr_factor))
        digest = hashlib.sha256(f"{self.config.seed}/rollback {self.watch.rollbacks}".encode()).digest()
        seed_everything(int.from_bytes(digest[:8], "little"))
        discard_checkpoints(self.output_dir / CHECKPOINTS, after=checkpoint.step, ranks=self.ranks)
        self._checkpoint()
        with self.ranks.agreed():
            logger.rewind(checkpoint.step)

    def _write_alarms(self) -> None:
        if self.ranks.rank == 0:
            write_alarms(self.output_dir, [dataclasses.asdict(alarm) for alarm in self.watch.alarms])

    # Saving

    def save_policy(self, folder: Path) -> Path:
        """Write the policy and its tokenizer to a folder, and the critic to `<folder>-value`.

        Adapters are merged into the policy's weights, or written alone, as `model.lora.merge` says.
        Engines such as vLLM read every `*.safetensors` of a model's folder as its weights.
        """
        policy, value = self.ranks.whole(self.models.policy), self.ranks.whole(self.models.value)
        with self.ranks.agreed():
            if self.ranks.rank == 0:
                self._write_policy(folder, policy, value)
        return folder

    def _write_policy(self, folder: Path, policy: nn.Module, value: nn.Module | None) -> None:
        value_folder, model = folder.with_name(f"{folder.name}-value"), self.config.model
        merge = model.lora is not None and model.lora.merge
        if model.lora is not None and model.lora.merge is None:
            merge = model.quantization is None
        if value is not None:  # first, so that a policy that is there has its critic beside it
            with naming(value_folder), atomic_folder(value_folder) as temporary:
                value.save_pretrained(temporary)
                if model.value_model == "adapter":
                    save_adapters(policy, temporary, VALUE)
        with naming(folder), atomic_folder(folder) as temporary:
            if model.lora is None or merge:
                (merge_lora(policy) if merge else policy).save_pretrained(temporary)
            else:
                save_adapters(policy, temporary)
            self.tokenizer.save_pretrained(temporary)

    def _state(self) -> dict[str, Any]:
        """A copy of all state but parameters and optimizer: {"rng": tensors, "state": JSON values}."""
        tensors, generators = rng_state()
        states = {name: getattr(self, name).state_dict() for name in STATEFUL}
        states |= {"rng": generators, "evaluated": self.step in self._evaluated}
        return {"rng": tensors, "state": copy.deepcopy(states)}

    def _saved_parameters(self) -> dict[str, dict[str, Tensor]]:
        """The parameters that a checkpoint holds, by group and name."""
        refreshed = self.config.algorithm_config.reference_refresh_steps
        reference = self.models.reference_parameters() if refreshed else {}
        groups = {"policy": self.policy_parameters, "value": self.value_parameters, "reference": reference}
        return {group: parameters for group, parameters in groups.items() if parameters}

    def _check_parameters(self) -> None:
        """Raise NonFiniteError if a trained parameter is NaN or infinite: a later step could not mend it."""
        if bad := self.ranks.nonfinite(self.learner.parameters()):
            what = f"the parameter {bad[0]} is not finite, so nothing was saved; lower optim.learning_rate"
            raise NonFiniteError(f"after step {self.step}: {what}")

    def _checkpoint(self) -> None:
        self.progress.phase("checkpoint")
        self._check_parameters()
        state = self._step_start or self._state()
        optimizer, optimizer_meta = optimizer_tensors(self.optimizer)
        generators = {
            _rng_group(rank): each for rank, each in enumerate(self.ranks.each(lambda: state["state"]["rng"]))
        }
        save_checkpoint(
            self.output_dir / CHECKPOINTS,
            self.step,
            tensors={**self._saved_parameters(), "optimizer": optimizer, _rng_group(self.ranks.rank): state["rng"]},
            state=state["state"] | generators | {"optimizer": optimizer_meta},
            config=to_dict(self.config),
            keep_last=self.config.checkpoint.keep_last,
            keep_for=self.watch.good_steps,
            ranks=self.ranks,
        )
        self._saved_step = self.step

    def _save_completed_steps(self) -> None:
        """After an error: save the completed steps, unless the failed one has changed parameters."""
        if (self._step_start and self.learner.changed) or self.step in (0, self._saved_step):
            return
        with contextlib.suppress(NonFiniteError):
            self._checkpoint()
            self.progress.print(f"saved a checkpoint of step {self.step}")

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to resume from, if any; raises rather than mix two runs in one folder."""
        root = self.output_dir / CHECKPOINTS
        if not self._resume:
            if self.ranks.first(lambda: any(root.glob("step-*")) or (self.output_dir / FINAL).exists()):
                raise CheckpointError(
                    f"{self.output_dir}: holds an earlier run; continue it with --resume, or choose another output_dir"
                )
            return None
        checkpoint = find_checkpoint(root, ranks=self.ranks)
        if checkpoint is not None:
            with restoring(f"{checkpoint.path}: config.json"):
                check_same_run(checkpoint.config, to_dict(self.config))
            if checkpoint.step > self.config.total_steps:
                raise ConfigError(
                    f"total_steps: {self.config.total_steps} is less than the {checkpoint.step} steps that "
                    f"{self.output_dir} has done; give at least {checkpoint.step}"
                )
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> list[Alarm]:
        """Restore all state; returns alarms of an evaluation after the checkpoint, which still have to be acted on."""
        path, state = checkpoint.path, checkpoint.state
        for group, parameters in self._saved_parameters().items():
            saved = checkpoint.tensors(group, parameters.get)
            with restoring(f"{path}: {group}.safetensors"), torch.no_grad():
                if wrong := sorted(saved.keys() ^ parameters.keys()):
                    there = "is no parameter of this model" if wrong[0] in saved else "is missing"
                    raise CheckpointError(f"{quote(wrong[0])} {there}")
                for name, parameter in parameters.items():
                    was, now = ((tensor.dtype, list(tensor.shape)) for tensor in (saved[name], parameter))
                    if was != now:
                        raise CheckpointError(f"{quote(name)} is {was[0]} {was[1]}, this model's is {now[0]} {now[1]}")
                    parameter.copy_(saved[name])
        tensors = checkpoint.tensors("optimizer", partial(parameter_of_state, self.optimizer))
        self.models.fetch_critic()  # a state goes where its parameter is
        with restoring(f"{path}: optimizer"):
            load_optimizer(self.optimizer, tensors, state["optimizer"])
        self.models.park()
        for name in STATEFUL:
            with restoring(f"{path}: state.json: {name}"):
                part = getattr(self, name)
                if part is not self.watch:  # whose rules may have changed
                    check_like(state[name], part.state_dict())
                part.load_state_dict(state[name])
        with restoring(f"{path}: state.json: scheduler"):
            if self.scheduler.last_epoch != checkpoint.step + 1:  # would be another step's learning rate
                raise CheckpointError(f"last_epoch is {self.scheduler.last_epoch}, expected {checkpoint.step + 1}")
        group = _rng_group(self.ranks.rank)
        group = group if group in state else _rng_group(0)  # a rank that the saved run did not have
        tensors = checkpoint.tensors(group)
        with restoring(f"{path}: {group}"):
            set_rng_state(tensors, state[group])
        self.step = self._saved_step = checkpoint.step
        rows = [row for row in read_metrics(self.output_dir / METRICS_FILE) if row["step"] <= self.step]
        rows = [row for row in rows if any(name.startswith("eval/") for name in row)]
        self._evaluated = {row["step"] for row in rows}
        self._behind, owed = not state.get("evaluated", True), []
        for row in rows if self._behind else ():
            if row["step"] == self.step:
                _, alarms = self.watch.observe(self.step, row)
                if checkpoint.config["total_steps"] > self.step:
                    owed += alarms
                for alarm in alarms:  # of the last evaluation of a run that is now prolonged
                    alarm.outcome = "warned" if alarm.action == "warn" else OVER
        return owed

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run after the current step; the second raises KeyboardInterrupt."""

        # torchrun passes on the signal that a terminal has sent to all processes already.
        grace = 0.0 if self.ranks.size == 1 else 3.0

        def ask(number: int, frame: Any) -> None:
            if self._asked is None:
                self._asked, self._asked_at = number, time.monotonic()
                self.progress.print("stopping after this step (once more to stop at once)")
            elif time.monotonic() - self._asked_at >= grace:
                raise KeyboardInterrupt

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread may handle signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _rng_group(rank: int) -> str:
    """Where a checkpoint has the random-number states of a rank."""
    return f"rng{rank or ''}"


def _check_packages(config: Config) -> None:
    """Raise ConfigError or EngineError for a package that is missing or too old, before minutes of reading weights."""
    if config.model.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError(f"model.lora needs peft; {install_command('demo')}")
    if config.model.quantization is not None:
        check_bitsandbytes("model.quantization")
    if config.optim.name != "adamw":
        check_bitsandbytes(f"optim.name: {config.optim.name}")
    if config.rollout.engine == "vllm":
        check_vllm()


def _lock_output_dir(name: str) -> tuple[Path, FolderLock]:
    try:
        folder = Path(name).expanduser()
        return folder, FolderLock(folder)
    except OSError as error:
        raise ConfigError(f"output_dir: {quote(name)} cannot be written to ({error.strerror or error})") from None
