"""What the passes of a run keep in memory: our own code, run on tensors without values.

A pass is cut into moments: before the first layer, the first layer, the last, the head with the loss, and backwards.
What is live in each grows by the same number of bytes with every further layer, so a model of two layers and one of
three tell of any number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from fastppo.algorithms.algorithm import Algorithm, head_arguments
from fastppo.algorithms.experience import Experience
from fastppo.errors import ConfigError, one_line
from fastppo.models import activations, packing
from fastppo.models.head import backbone_of, causal_of, logits_of
from fastppo.models.load import load_configuration, why
from fastppo.models.policy_models import PolicyModels
from fastppo.models.source import ModelError
from fastppo.ops.linear_kl import linear_kl
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.rollout.continuous import MOST_TOKENS
from fastppo.rollout.loop import cache_name
from fastppo.training.config import Config
from fastppo.training.plan.live import Bytes, LiveBytes, Peak
from fastppo.training.plan.skeleton import build_models, fake_, layers_of, num_bytes, tensors_of

Moments = dict[str, dict[str, Peak]]
"""By phase, and by moment of it."""


class Shape(NamedTuple):
    """What passes through the models at a time, of one process."""

    prompt: int  # tokens
    completion: int
    rows: int  # sequences of a forward or backward pass
    passes: int  # in an optimizer step
    sampled: int  # most sequences that are sampled together, in a step or an evaluation
    evaluated: int  # in an evaluation, each with a prompt of its own
    generations: int  # completions of a prompt
    processes: int


class Sizes(NamedTuple):
    """Of what stays, of one process and before it is divided among several: bytes, or numbers where it says so."""

    policy: int
    critic: int
    reference: int
    trained_policy: int  # in their own data types, as gradients are
    trained_critic: int
    optimizer: int
    policy_numbers: int
    policy_layer: int  # numbers of the largest layer
    policy_rest: int  # numbers of what lies in no layer
    critic_layer: int
    critic_rest: int
    reference_rest: int
    largest_trained: int  # numbers of the largest trained parameter
    linear_numbers: int  # of the policy's dense linear layers
    head: int  # numbers of an untied head


class Traced(NamedTuple):
    sizes: Sizes
    moments: Moments
    cache: int
    """Keys and values of a token of a sequence."""

    def at(self, depth: int, other: Traced, at: int) -> Traced:
        """Of `at` layers, by this one of `depth` and another of one layer more."""

        def along(a: int, b: int) -> int:
            return a + (at - depth) * (b - a)

        def bytes_along(a: Bytes, b: Bytes) -> Bytes:
            return Bytes(*map(along, a, b))

        moments = {
            phase: {
                moment: Peak(*map(bytes_along, peak, other.moments[phase][moment]))
                for moment, peak in peaks.items()
                if moment in other.moments[phase]
            }
            for phase, peaks in self.moments.items()
        }
        return Traced(Sizes(*map(along, self.sizes, other.sizes)), moments, along(self.cache, other.cache))


def trace(
    config: Config,
    algorithm: Algorithm,
    shape: Shape,
    depth: int | None,
    device_type: str,
    *,
    sharded: bool,
    engine: str,
) -> Traced:
    """Trace the phases of a step with models of `depth` layers, None for all.

    Args:
        device_type: of the device that is planned for.
        sharded: whether a layer's parameters are gathered before it runs, in autocast's precision.
        engine: what samples.

    Raises:
        ModelError: the model cannot run on tensors without values.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise ConfigError(f"a plan needs PyTorch's FakeTensorMode, which this version lacks ({error})") from None

    build = functools.cache(lambda: build_models(config, algorithm, depth, device_type))
    sizes = sizes_of(config, algorithm, depth, device_type, build)
    keys = _keys(config, algorithm, shape, depth, device_type, sharded, engine)
    if any(key not in _known for key in keys.values()):
        models = build()
        with FakeTensorMode(allow_non_fake_inputs=True):
            gathered = getattr(torch, config.model.autocast) if sharded and config.model.autocast else None
            fake_(models, gathered)
            phases = _Phases(config, algorithm, models, shape, engine, cuda=device_type == "cuda", sharded=sharded)
            try:
                for phase, run in phases.phases():
                    if keys[phase] not in _known:
                        _known[keys[phase]] = _moments(models, run), phases.cache
            except Exception as error:  # of any kind: a model that looks at values, or has no keys and values to keep
                name = one_line(config.model.name_or_path, 200)
                raise ModelError(f"{name}: a pass of it cannot be planned ({why(error)})") from error
    known = {phase: _known[key] for phase, key in keys.items()}
    return Traced(sizes, {phase: moments for phase, (moments, _) in known.items()}, known["rollout"][1])


_known: dict[str, Any] = {}
"""What was traced before, by all that it depends on: plans that differ in one key have most in common."""


def _keys(
    config: Config,
    algorithm: Algorithm,
    shape: Shape,
    depth: int | None,
    device_type: str,
    sharded: bool,
    engine: str,
) -> dict[str, str]:
    """What each phase depends on."""
    models = _dependencies(config, algorithm, depth, device_type)
    common = (models, shape.prompt, shape.completion, shape.generations, sharded)
    rollout = ("rollout", *common, shape.sampled, shape.evaluated, engine)
    model, passes = config.model, (shape.rows, shape.passes == shape.processes == 1)
    memory = model.gradient_checkpointing, model.activation_offloading
    apart = ["critic update"] * (model.value_model != "shared" and algorithm.needs_values)
    others = {
        phase: (phase, *common, passes, memory, algorithm.backend, config.algorithm_config)
        for phase in ("score", "policy update", *apart)
    }
    return {phase: repr(key) for phase, key in {"rollout": rollout, **others}.items()}


def _dependencies(config: Config, algorithm: Algorithm, depth: int | None, device_type: str) -> tuple:
    """What the sizes of a run's models depend on."""
    alike = {"gradient_checkpointing": False, "activation_offloading": False, "offload_idle": False}
    models = dataclasses.replace(config.model, **alike)
    names = filter(None, (models.name_or_path, models.value_name_or_path))
    # Whole, not by name: a file may change between two plans.
    configurations = [load_configuration(dataclasses.replace(models, name_or_path=name)) for name in names]
    values = algorithm.needs_values, config.algorithm_config.multi_objective_aggregation, len(config.rewards)
    return models, *configurations, config.algorithm, *values, depth, device_type


def sizes_of(
    config: Config,
    algorithm: Algorithm,
    depth: int | None,
    device_type: str,
    build: Callable[[], PolicyModels] | None = None,
) -> Sizes:
    """The sizes of models of `depth` layers, None for all; `build` makes the models."""
    key = repr(("sizes", config.optim.name, *_dependencies(config, algorithm, depth, device_type)))
    if key not in _known:
        models = build() if build is not None else build_models(config, algorithm, depth, device_type)
        _known[key] = _sizes(config, models)
    return _known[key]


def _sizes(config: Config, models: PolicyModels) -> Sizes:
    policy, critic = (list(p.values()) for p in (models.policy_parameters(), models.value_parameters()))
    parts = [tensors_of(part) for part in (models.policy, models.value, models._reference)]
    linear = {id(m.weight): m.weight.numel() for m in models.policy.modules() if type(m) is nn.Linear}
    causal = causal_of(models.policy)
    head, embeddings = causal.get_output_embeddings().weight, causal.get_input_embeddings().weight
    return Sizes(
        *map(num_bytes, (*parts, policy, critic)),
        sum(_optimizer_bytes(config.optim.name, parameter) for parameter in policy + critic),
        sum(t.numel() for t in parts[0]),
        *_layers(models.policy),
        *_layers(getattr(models.value, "backbone", None)),
        _layers(models._reference)[1],
        max(p.numel() for p in policy + critic),
        sum(linear.values()),
        0 if head is embeddings else head.numel(),
    )


def _layers(model: nn.Module | None) -> tuple[int, int]:
    """Numbers of the largest layer, and of what lies in no layer."""
    if model is None:
        return 0, 0
    layers = [sum(t.numel() for t in tensors_of(layer)) for layer in layers_of(model)]
    return max(layers, default=0), sum(t.numel() for t in tensors_of(model)) - sum(layers)


def _optimizer_bytes(name: str, parameter: Tensor) -> int:
    count = parameter.numel()
    if name == "adamw":
        return 2 * num_bytes([parameter]) + 4
    # bitsandbytes keeps small tensors' moments in float32.
    return 8 * count if count < 4096 else 2 * count + 2 * 4 * math.ceil(count / 256)


def _moments(models: PolicyModels, run: Callable[[LiveBytes], None]) -> dict[str, Peak]:
    parts = [models.policy, models.value, models._reference]
    with LiveBytes([tensor for part in parts for tensor in tensors_of(part)]) as live, contextlib.ExitStack() as stack:
        for part in parts:
            if part is None:
                continue
            layers = layers_of(part) if part is not models.value else layers_of(getattr(part, "backbone", part))
            for layer in layers:
                place = "first layer" if layer is layers[0] else "last layer" if layer is layers[-1] else "layers"
                stack.enter_context(_marked(layer, place, live))
            for parameter in part.parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_post_accumulate_grad_hook(live.count_gradient).remove)
        live.mark("begin")
        run(live)
    for part in parts:
        for parameter in part.parameters() if part is not None else ():
            parameter.grad = None
    return live.peaks


@contextlib.contextmanager
def _marked(layer: nn.Module, place: str, live: LiveBytes) -> Iterator[None]:
    """Mark when the layer begins, forward and backward."""

    def begin(module: nn.Module, arguments: tuple) -> None:
        if not live.backward:
            live.mark(live.pass_ + place)

    def end(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if not live.backward and hidden.requires_grad:
            hidden.register_hook(lambda gradient: live.mark(f"{place}, backward"))
        if not live.backward and place == "last layer":
            live.mark(live.pass_ + "head")

    handles = layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompts_read(engine: str, shape: Shape, *, packs: bool) -> int:
    """Prompts that one pass reads when sampling begins.

    Args:
        packs: whether sequences need no padding.
    """
    if engine == "continuous":
        return max(1, min(shape.sampled, MOST_TOKENS // shape.prompt))
    shared = shape.generations if engine == "loop" and packs else 1  # it reads a prompt once for all its completions
    return max(1, shape.sampled // shared, shape.evaluated)


class _Phases:
    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        models: PolicyModels,
        shape: Shape,
        engine: str,
        *,
        cuda: bool,
        sharded: bool,
    ) -> None:
        self.config, self.algorithm, self.models, self.shape = config, algorithm, models, shape
        self.engine, self.cuda, self.sharded = engine, cuda, sharded
        self.cache = 0

    def phases(self) -> Iterator[tuple[str, Callable[[LiveBytes], None]]]:
        yield "rollout", self._rollout
        yield "score", self._score
        apart = self.models.critic_apart
        yield "policy update", lambda live: self._update(live, policy=True, critic=not apart)
        if apart:
            yield "critic update", lambda live: self._update(live, policy=False, critic=True)

    # The phases

    @torch.no_grad()
    def _rollout(self, live: LiveBytes) -> None:
        """Read the prompts, then, with the keys and values of whole sequences, draw the last token."""
        from transformers import DynamicCache

        shape, causal = self.shape, causal_of(self.models.policy)
        backbone = backbone_of(causal)
        rows, length = shape.sampled, shape.prompt + shape.completion - 1
        name = cache_name(causal)

        def step(ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
            positions = mask.cumsum(1)[:, -ids.shape[1] :]
            arguments = {"attention_mask": mask, "position_ids": positions, "use_cache": True, name: cache}
            return logits_of(causal, backbone(input_ids=ids, **arguments).last_hidden_state[:, -1])

        # The thread of continuous batching does not see autocast.
        with contextlib.nullcontext() if self.engine == "continuous" else self.models.autocast():
            cache = DynamicCache(config=causal.config)
            prompts = prompts_read(self.engine, shape, packs=backbone.fastppo_can_pack)
            ids = torch.zeros(prompts, shape.prompt, dtype=torch.long)
            step(ids, torch.ones_like(ids), cache)
            live.mark("prompts read")
            states = [(layer.keys, layer.values) for layer in cache.layers]
            self.cache = sum(num_bytes(list(pair)) for pair in states) // (prompts * shape.prompt)
            if self.engine == "vllm":  # which has them in the precision of its weights; here autocast may not
                own = getattr(torch, self.config.model.autocast or self.config.model.dtype).itemsize
                self.cache = own * sum(x.numel() for pair in states for x in pair) // (prompts * shape.prompt)
            whole = DynamicCache(config=causal.config)
            live.mark("cache")
            for index, (keys, values) in enumerate(states):
                size = (rows, keys.shape[1], length - 1)
                whole.update(keys.new_empty(*size, keys.shape[3]), values.new_empty(*size, values.shape[3]), index)
            del cache, states, keys, values
            live.pass_ = "sampling, "
            live.mark("sampling, begin")
            ids = torch.zeros(rows, 1, dtype=torch.long)
            logits = step(ids, torch.ones(rows, length, dtype=torch.long), whole)
            scores = logits.float()
            live.mark("drawing")
            parts = min(rows, max(1, 2**25 // logits.shape[1]))
            z = [torch.empty(parts, logits.shape[1], dtype=torch.float64) for _ in range(3)]
            del z, scores, whole

    @torch.no_grad()
    def _score(self, live: LiveBytes) -> None:
        batch, models = self._batch(), self.models
        keep = self.keeps_pass
        arguments = (batch.sequences, batch.attention_mask, batch.mask.shape[1])
        with self._laid_out(), models.autocast():
            with torch.set_grad_enabled(keep):
                hidden, head = models.hidden(*arguments)
            kept = hidden
            hidden = hidden.detach()
            linear_logprob(hidden, targets=batch.targets, **self._head(head))
            if models.value is not None:
                live.pass_ = "critic, "
                live.mark("critic, begin")
                models.values(hidden, *arguments)
            if models.has_reference:
                live.pass_ = "reference, "
                live.mark("reference, begin")
                ref_hidden, ref_head = models.reference_hidden(*arguments)
                if self.config.algorithm_config.kl_estimator == "exact":
                    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_head.weight, "ref_bias": ref_head.bias}
                    linear_kl(hidden, mask=batch.mask, **reference, **self._head(head))
                else:
                    linear_logprob(ref_hidden, targets=batch.targets, **self._head(ref_head))
            del kept

    def _update(self, live: LiveBytes, *, policy: bool, critic: bool) -> None:
        """A pass forward and backward; with several of them, one that adds to the gradients of the others."""
        batch, models = self._batch(), self.models
        arguments = (batch.sequences, batch.attention_mask, batch.mask.shape[1])
        live.mark("begin")
        with self._laid_out(), models.training():
            with models.autocast():
                hidden = head = None
                if policy:
                    hidden, head = models.hidden(*arguments)
                values = models.values(hidden, *arguments) if critic else None
                ref_head = models.reference_head() if batch.ref_hidden is not None else None
                live.mark("loss")
                loss = self.algorithm.loss(batch, hidden, head, values, ref_head).loss
            del hidden, head, values, ref_head
            live.mark("backward")
            live.backward = True
            (loss * 1.0).backward()
            live.mark("end")

    # Their parts

    @property
    def keeps_pass(self) -> bool:
        """Whether the pass that scores the policy serves the update, too: see `Scorer.score`."""
        one = self.shape.passes == self.shape.processes == 1
        once = self.config.algorithm_config.num_mini_batches == 1
        alone = self.algorithm.update_starts_with_scored_pass and not self.config.model.gradient_checkpointing
        return one and once and alone

    def _head(self, head) -> dict:
        return head_arguments(head, self.config.rollout.temperature, self.algorithm.backend)

    def _batch(self) -> Experience:
        prompt, completion, rows = self.shape[:3]
        length = prompt + completion
        ids = torch.zeros(rows, length, dtype=torch.long)
        token = torch.zeros(rows, completion)
        objectives = [reward.name for reward in self.config.rewards]
        values = token[..., None].expand(rows, completion, len(objectives)) if self._by_objective else token
        section = self.config.algorithm_config
        penalized = section.kl_in == "loss" and (section.kl_coef > 0 or section.kl_controller == "linear")
        exact = penalized and section.kl_estimator == "exact"
        width = causal_of(self.models.policy).get_output_embeddings().weight.shape[1]
        return Experience(
            sequences=ids,
            attention_mask=torch.ones_like(ids),
            mask=torch.ones(rows, completion, dtype=torch.bool),
            scores=torch.zeros(rows),
            old_logprobs=token,
            old_values=values,
            ref_logprobs=token if self.models.has_reference else None,
            ref_hidden=torch.zeros(rows, completion, width) if exact else None,
            rollout_logprobs=token,
            importance_weights=token if self.config.rollout.correction != "none" else None,
            advantages=token,
            returns=values,
        )

    @property
    def _by_objective(self) -> bool:
        return self.config.algorithm_config.multi_objective_aggregation == "normalize_then_sum"

    @contextlib.contextmanager
    def _laid_out(self) -> Iterator[None]:
        """Sequences are packed as real ones of these lengths would be: `pack` looks at their tokens."""
        host = mock.patch.object(activations, "_to_host", _OnHost) if self.cuda else contextlib.nullcontext()
        with mock.patch.object(packing, "pack", _packer(self.shape)), host:
            yield


class _OnHost:
    """Stands in for a tensor that `model.activation_offloading` has moved off the GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._layout = tensor.shape, tensor.stride(), tensor.dtype

    def to(self, device: torch.device, **_) -> Tensor:
        shape, stride, dtype = self._layout
        return torch.empty_strided(shape, stride, dtype=dtype)


def _packer(shape: Shape):
    original = packing.pack

    def pack(sequences: Tensor, attention_mask: Tensor, num_completion: int, dim: int):
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            prompts = torch.arange(shape.rows) // shape.generations
            ids = prompts[:, None].expand(shape.rows, shape.prompt + shape.completion).contiguous()
            packed = original(ids, torch.ones_like(ids), shape.completion, dim)
        return packed and packing.Packed(*(torch.empty(x.shape, dtype=x.dtype) for x in packed))

    return pack
