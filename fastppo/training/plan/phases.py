"""The memory of a run by phase: what its models keep, by arithmetic, and what their passes add, by tracing.

of a process       load | rollout | score | policy update | critic update | optimizer step | checkpoint
weights, gradients, optimizer states, activations, copies of weights, keys and values, scratch, reserve
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

from fastppo.algorithms import ALGORITHMS
from fastppo.algorithms.algorithm import Algorithm
from fastppo.engines.budget import DEFAULT_SCRATCH_BYTES, SHARE_OF_A_GPU, scratch_bytes
from fastppo.errors import ConfigError
from fastppo.models.load import load_configuration, load_pretrained
from fastppo.models.source import ModelError, resolve
from fastppo.rollout.choose import auto
from fastppo.rollout.continuous import MOST_TOKENS, cache_tokens
from fastppo.rollout.loop import multiplies_bfloat16
from fastppo.training.config import Config
from fastppo.training.distributed import strategy_of
from fastppo.training.plan.live import Bytes
from fastppo.training.plan.skeleton import num_bytes, num_layers, tensors_of
from fastppo.training.plan.trace import Shape, Traced, prompts_read, sizes_of, trace
from fastppo.training.plan.vllm import GRAPHS, OTHERWISE, VLLMBytes, largest_batch, vllm_bytes

KINDS = ("weights", "gradients", "optimizer", "activations", "weight copies", "KV cache", "scratch", "reserve")
CONTEXT, CONTEXT_OF_SEVERAL = 600 * 2**20, 1200 * 2**20
"""What CUDA and its libraries take of a GPU, and with NCCL."""
FRAGMENTED = 0.05
"""Share of the tensors that PyTorch's allocator may hold besides them."""
PROCESS = 600 * 2**20
"""Python and its packages, on a CPU."""
AMPLE = 0.9
"""Share of the memory that a plan which may be wrong should leave room in."""
_DEPTH = 2
_PAGED_FROM = 100_000  # numbers of a parameter whose moments bitsandbytes pages


class Machine(NamedTuple):
    """What a plan is for."""

    device: str  # cuda or cpu
    memory: int  # bytes of a process
    processes: int = 1

    @property
    def device_memory(self) -> int:
        """Of the whole device: processes on a CPU share one."""
        return self.memory * (1 if self.device == "cuda" else self.processes)


class Phase(NamedTuple):
    name: str
    moment: str  # when most is needed
    kinds: dict[str, int]  # bytes by the names of KINDS
    moments: dict[str, int]  # bytes of each of its moments

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    @property
    def tensors(self) -> int:
        """What a tracker of tensors would see."""
        return self.total - self.kinds["scratch"] - self.kinds["reserve"]


class Memory(NamedTuple):
    """What a configuration needs of one process."""

    phases: list[Phase]
    shape: Shape
    notes: list[str]
    engine: str
    """What samples."""
    vllm: int | None = None
    """Bytes that vLLM gets, where it samples."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def engine_of(config: Config, device: str) -> str:
    """The engine that samples: the one asked for, or what `auto` takes on such a device for a model that it knows."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    name, _ = auto(torch.device(device))
    return "transformers" if name == "continuous" and config.model.dtype == "float32" else name


def shape_of(config: Config, processes: int, rows: int | None = None) -> Shape:
    """The largest passes that the configuration allows: prompts and completions as long as they may be.

    Args:
        rows: sequences in a pass, in place of the configuration's; the number of passes stays.
    """
    rollout, section = config.rollout, config.algorithm_config
    completion, prompt = rollout.max_new_tokens, config.data.max_prompt_length
    limit = getattr(load_configuration(config.model).get_text_config(), "max_position_embeddings", None)
    prompt = max(1, min(prompt, limit - completion)) if limit else prompt
    sequences = rollout.num_prompts * rollout.num_generations
    own = math.ceil(sequences / processes)
    step = math.ceil(math.ceil(sequences / section.num_mini_batches) / processes)  # in an optimizer step
    own_rows = math.ceil(section.micro_batch_size(sequences) / processes)
    if config.batch.max_tokens is not None:
        own_rows = max(1, min(step, config.batch.max_tokens // (prompt + completion)))
    passes = math.ceil(step / own_rows)
    held_out = _held_out(config, processes)
    sampled, evaluated = (min(n, rollout.generation_batch_size) for n in (max(own, held_out), held_out))
    return Shape(prompt, completion, rows or own_rows, passes, sampled, evaluated, rollout.num_generations, processes)


def _held_out(config: Config, processes: int) -> int:
    """Sequences of an evaluation."""
    there = config.eval.num_prompts if config.data.eval is not None else config.data.eval_size
    return math.ceil(min(there, config.eval.num_prompts) / processes)


def memory_of(config: Config, machine: Machine, rows: int | None = None) -> Memory:
    """The memory of every phase.

    Raises:
        ModelError: the configuration of a model cannot be had.
    """
    backend = config.backend_name if machine.device == "cpu" or config.backend_name == "reference" else None
    algorithm = ALGORITHMS[config.algorithm](
        config.algorithm_config, temperature=config.rollout.temperature, backend=backend
    )
    shape = shape_of(config, machine.processes, rows)
    sharded = strategy_of(config, machine.processes) == "fsdp2"
    engine = engine_of(config, machine.device)
    if engine == "loop" and machine.device == "cuda":
        raise ConfigError("rollout.engine: loop samples on a CPU, and this is planned for a GPU; set it to auto")
    traced = _traced(config, algorithm, shape, machine.device, sharded, engine)
    return _Phases(config, algorithm, machine, shape, traced, engine).memory()


def _traced(config: Config, algorithm: Algorithm, shape: Shape, device: str, sharded: bool, engine: str) -> Traced:
    depth = num_layers(load_configuration(config.model))
    options = {"sharded": sharded, "engine": engine}
    if depth is not None and config.model.value_name_or_path is None:
        small, larger = (trace(config, algorithm, shape, d, device, **options) for d in (_DEPTH, _DEPTH + 1))
        whole = small.at(_DEPTH, larger, depth)
        if whole.sizes == sizes_of(config, algorithm, None, device):  # layers are alike
            return whole
    return trace(config, algorithm, shape, None, device, **options)


class _Phases:
    def __init__(
        self, config: Config, algorithm: Algorithm, machine: Machine, shape: Shape, traced: Traced, engine: str
    ) -> None:
        self.engine = engine
        self.config, self.algorithm, self.machine, self.shape = config, algorithm, machine, shape
        self.traced, self.sizes, self.notes = traced, traced.sizes, []
        self.cuda = machine.device == "cuda"
        self.sharded = strategy_of(config, machine.processes) == "fsdp2"
        self.share = machine.processes if self.sharded else 1
        self.apart = config.model.value_model != "shared" and algorithm.needs_values
        self.parked = self.cuda and config.model.offload_idle
        self.on_host = self.sharded and config.distributed.cpu_offload and self.cuda
        self.vllm = self._vllm_bytes() if engine == "vllm" else None
        self.awake: dict[str, int] = {}  # what vLLM has then
        self.asleep: dict[str, int] = {}

    def memory(self) -> Memory:
        if self.vllm is not None:
            self._make_room_for_vllm(self._phases())
        phases = self._phases()
        length, budget = self.shape.prompt + self.shape.completion, self.config.batch.max_tokens
        if budget is not None and budget < length:
            self.notes.append(
                f"batch.max_tokens {budget} is less than the longest sequence; training needs it to be more"
            )
        if self.config.eval.perplexity is not None:
            self.notes.append("the texts of eval.perplexity are taken to be no longer than these sequences")
        # vLLM's share: of a GPU all that it takes there; of a CPU what it keeps.
        vllm = sum(self.asleep.values()) + (sum(self.awake.values()) if self.cuda else 0)
        return Memory(phases, self.shape, self.notes, self.engine, vllm or None)

    def _phases(self) -> list[Phase]:
        phases = [self._load(), self._rollout(), self._score(), self._update("policy update")]
        if "critic update" in self.traced.moments:
            phases.append(self._update("critic update"))
        return [*phases, self._optimizer_step(), self._checkpoint()]

    # What stays

    def _weights(self, *, critic: bool = True, reference: bool = True) -> int:
        """On the device, with the critic and the reference or while they are parked."""
        sizes = self.sizes
        if self.on_host:
            return self._reward_models
        total = sizes.policy + (sizes.critic if critic or not self.parked else 0)
        total += sizes.reference if reference or not self.parked else 0
        return total // self.share + self._reward_models

    @property
    def _optimizer(self) -> int:
        if self.on_host or (self.cuda and self.config.optim.name.startswith("paged")):
            return 0
        return self.sizes.optimizer // self.share

    def _gradients(self, trained: int) -> int:
        return 0 if self.on_host else trained // self.share

    @property
    def _reward_models(self) -> int:
        if not hasattr(self, "_rewards"):
            rewards = [*self.config.rewards, *self.config.eval.rewards]
            self._rewards = sum(self._reward_model(reward.model) for reward in rewards if reward.model is not None)
        return self._rewards

    def _reward_model(self, name: str) -> int:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        defaults = self.config.model
        try:
            source = resolve(name, allow_download=defaults.allow_download)
            hf = load_pretrained(AutoConfig, source, defaults)
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(hf, dtype=getattr(torch, defaults.dtype))
            return num_bytes(tensors_of(model))
        except (ModelError, AttributeError, ImportError, RuntimeError, TypeError, ValueError):
            self.notes.append(f"without the reward model {name}, whose configuration cannot be had")
            return 0

    # What sharding gathers

    @property
    def _gathered_size(self) -> int:
        model = self.config.model
        return getattr(torch, model.autocast or model.dtype).itemsize

    def _gathered(self, rest: int, layer: int, *, layers: int = 2) -> int:
        """What lies in no layer, and layers: the one that runs and the next."""
        return (rest + layers * layer) * self._gathered_size if self.sharded else 0

    def _reduced(self, numbers: int) -> int:
        """So many gradients, and their float32 copy that is summed over the processes."""
        return numbers * (self._gathered_size + 4) if self.sharded else 0

    # The phases

    def _phase(self, name: str, moments: dict[str, dict[str, int]]) -> Phase:
        """The moment that needs most, with the reserve."""
        whole = {moment: {kind: int(kinds.get(kind, 0)) for kind in KINDS} for moment, kinds in moments.items()}
        for kinds in whole.values():
            if self.cuda:
                context = CONTEXT if self.machine.processes == 1 else CONTEXT_OF_SEVERAL
                kinds["reserve"] = context + int(FRAGMENTED * sum(kinds.values()))
            else:
                kinds["reserve"] = PROCESS
            for kind, size in self.asleep.items() if name != "load" else ():
                kinds[kind] += size
        totals = {moment: sum(kinds.values()) for moment, kinds in whole.items()}
        peak = max(totals, key=totals.get)
        return Phase(name, peak, whole[peak], totals)

    def _load(self) -> Phase:
        sizes, model = self.sizes, self.config.model
        itemsize = getattr(torch, model.dtype).itemsize
        if self.sharded:
            extra = 0 if self.on_host else itemsize * max(sizes.policy_layer, sizes.policy_rest)
            return self._phase("load", {"sharding": {"weights": self._weights() + extra}})
        # A reference is a whole copy at first, whose products are then rounded.
        copy = sizes.policy - sizes.reference if sizes.reference else 0
        weights = self._weights() + max(0, copy)
        extra = 0
        if model.quantization is not None:  # the weights are read on the host in `dtype`, and packed one by one
            extra = 0 if self.cuda else max(0, self._dense() - sizes.policy)
        return self._phase("load", {"load": {"weights": weights + extra}})

    def _dense(self) -> int:
        """Bytes of a quantized model before it is."""
        import copy

        plain = copy.deepcopy(self.config)
        plain.model.quantization = plain.model.lora = None
        plain.model.value_model, plain.model.reference = "shared", "none"
        return sizes_of(plain, self.algorithm, None, self.machine.device).policy

    def _vllm_bytes(self) -> VLLMBytes:
        config, shape, sizes = self.config, self.shape, self.sizes
        model, adapters = config.model, 0
        numbers = sizes.policy_numbers
        if model.lora is not None:
            numbers, adapters = self._dense() // getattr(torch, model.dtype).itemsize, sizes.trained_policy
        weights = numbers * getattr(torch, model.autocast or model.dtype).itemsize
        if model.quantization is not None and self.cuda:  # on a CPU it gets the weights dequantized
            weights = sizes.policy - adapters
        if not self.cuda:  # the engine takes the policy's own size off its share
            weights = max(weights, sizes.policy)
        own = math.ceil(config.rollout.num_prompts * config.rollout.num_generations / shape.processes)
        sequences = max(own, _held_out(config, shape.processes))
        sizes = {"weights": weights, "adapters": adapters, "cache": self.traced.cache}
        shared = config.rollout.vllm.tensor_parallel_size
        batch = largest_batch(self.machine.device, self.machine.memory, shared)
        return vllm_bytes(config, batch, **sizes, sequences=sequences, length=shape.prompt + shape.completion)

    def _make_room_for_vllm(self, phases: list[Phase]) -> None:
        """It gets what the trainer leaves and no more than it can use, or the share that is given.

        Args:
            phases: without vLLM.
        """
        memory, vllm, section = self.machine.memory, self.vllm, self.config.rollout.vllm
        share = section.gpu_memory_utilization
        if self.cuda:
            self.asleep = {"reserve": OTHERWISE + GRAPHS * (not section.enforce_eager)}
            left = (AMPLE * memory - phases[1].total - self.asleep["reserve"]) / (1 + FRAGMENTED)
            beside = vllm.activations + self.asleep["reserve"]  # of a share
            if self.config.model.lora is not None:
                self.notes.append("asleep, vLLM keeps its weights, without the adapters, in the host's memory")
        else:
            left, beside = AMPLE * memory - max(phase.total for phase in phases), 0
        if share is None:
            cache = vllm.cache_in(left - vllm.activations, fill=False)
        else:
            cache = vllm.cache_in(share * self.machine.device_memory - beside, fill=True)
        self.awake = {"weight copies": vllm.weights, "activations": vllm.activations, "KV cache": cache}
        if not self.cuda:  # where it cannot sleep
            self.asleep = {kind: size for kind, size in self.awake.items() if kind != "activations"}

    def _rollout(self) -> Phase:
        shape, model = self.shape, self.config.model
        weights = self._weights(critic=False, reference=False)
        gathered = self.sizes.policy_numbers * self._gathered_size if self.sharded else 0
        if self.vllm is not None:
            kinds = {"weights": weights, "weight copies": gathered, "optimizer": self._optimizer}
            for kind, size in self.awake.items():
                kinds[kind] = kinds.get(kind, 0) + (size if self.cuda or kind == "activations" else 0)
            return self._phase("rollout", {"sampling": kinds})
        laid_out = 0
        may_lay_out = self.engine == "loop" and model.autocast and not self.sharded and model.lora is not None
        if may_lay_out and multiplies_bfloat16():
            laid_out = 2 * self.sizes.linear_numbers  # it lays weights out anew
        pages, beside = self._pages() if self.engine == "continuous" else (0, 0)
        moments = {}
        for moment, peak in self.traced.moments["rollout"].items():
            now = peak.first
            reading = not moment.startswith(("cache", "sampling", "drawing"))
            tokens = shape.prompt if reading else shape.prompt + shape.completion - 1
            rows = shape.sampled
            if reading and self.engine == "continuous":
                rows = prompts_read(self.engine, shape, packs=False)
            cache = min(now.total - now.copies, self.traced.cache * rows * tokens)
            moments[moment] = {
                "weights": weights,
                "weight copies": max(now.copies, laid_out) + gathered,
                "optimizer": self._optimizer,
                "activations": now.total - now.copies - cache + beside,
                "KV cache": pages or cache,
            }
        return self._phase("rollout", moments)

    def _pages(self) -> tuple[int, int]:
        """Bytes of the cache of continuous batching, and of what attention makes of it for a layer."""
        shape, model = self.shape, self.config.model
        tokens = cache_tokens(shape.sampled, shape.prompt + shape.completion)
        pages = self.traced.cache * tokens
        text = load_configuration(model).get_text_config()
        beside = pages // text.num_hidden_layers  # its keys and values in one piece
        if model.dtype == "float32" or model.attn_implementation == "eager":  # with a mask
            beside += MOST_TOKENS * tokens * getattr(torch, model.dtype).itemsize
        return pages, beside

    def _score(self) -> Phase:
        sizes = self.sizes
        moments = {}
        for moment, peak in self.traced.moments["score"].items():
            now = peak.first
            scratch = self._scratch(loss=False) if moment.endswith("head") else 0
            # What lies in no layer is there of policy and reference alike; what it was gathered in goes with the first
            # layer of its own model.
            rest = sizes.policy_rest + 2 * sizes.reference_rest
            rest += sizes.policy_rest if moment in ("begin", "first layer") else 0
            rest += 2 * sizes.critic_rest if moment.startswith("critic") else 0
            gathered = self._gathered(rest, sizes.policy_layer)
            moments[moment] = {
                "weights": self._weights(),
                "weight copies": now.copies + gathered,
                "optimizer": self._optimizer,
                "activations": now.total - now.copies,
                "scratch": scratch,
            }
        return self._phase("score", moments)

    def _update(self, name: str) -> Phase:
        sizes, critic = self.sizes, name == "critic update"
        own = sizes.trained_critic if critic else sizes.trained_policy
        own += 0 if self.apart else sizes.trained_critic
        there = sizes.trained_policy if critic else 0  # gradients of passes before these
        rest, layer, head = sizes.policy_rest, sizes.policy_layer, sizes.head * self._gathered_size
        separate = critic and self.config.model.value_model == "separate"
        if separate:
            rest, layer, head = sizes.critic_rest, sizes.critic_layer, 0
        whole = separate or self.config.model.lora is None  # whether all parameters have gradients
        again = self.shape.passes > 1 or self.sharded
        moments = {}
        for moment, peak in self.traced.moments[name].items():
            now: Bytes = peak.later if again else peak.first
            copies = now.copies
            if self.sharded and moment == "end":
                copies += self._reduced(rest) + 4 * layer if whole else 0
            elif self.sharded:
                copies += self._gathered(rest, layer)
                copies += self._reduced(layer) + head if whole and "backward" in moment else 0
            gradients = self._gradients(there + (own if again else 0)) + (0 if again else now.gradients)
            if self.sharded and whole and self.shape.passes == 1 and moment != "end":
                gradients -= self._gradients(4 * rest)
            moments[moment] = {
                "weights": self._weights(critic=critic or not self.apart, reference=False),
                "gradients": gradients,
                "optimizer": self._optimizer,
                "activations": now.passing() - now.copies,
                "weight copies": copies,
                "scratch": self._scratch(loss=True) if moment == "loss" and not critic else 0,
            }
        return self._phase(name, moments)

    def _optimizer_step(self) -> Phase:
        sizes, moments = self.sizes, {}
        gradients = self._gradients(sizes.trained_policy + sizes.trained_critic)
        kinds = {"weights": self._weights(reference=False), "gradients": gradients, "optimizer": self._optimizer}
        if not self.cuda and self.config.optim.name != "adamw":
            kinds["scratch"] = 3 * 4 * sizes.largest_trained  # its kernels for a CPU are PyTorch's operators
        moments["optimizer step"] = kinds
        if self.config.algorithm in ("trpo", "npg", "cpi"):
            # Directions of the size of the policy: conjugate gradients have five, and there is a copy of the old one.
            kinds["activations"] = 6 * sizes.trained_policy // self.share
        return self._phase("optimizer step", moments)

    def _checkpoint(self) -> Phase:
        sizes, model = self.sizes, self.config.model
        kinds = {"weights": self._weights(reference=False), "optimizer": self._optimizer}
        itemsize = 4 if model.lora is not None else getattr(torch, model.dtype).itemsize
        # Every parameter is looked at for NaN.
        kinds["activations"] = sizes.largest_trained * (itemsize + 3) // self.share
        merges = model.lora is not None and (not model.quantization if model.lora.merge is None else model.lora.merge)
        if merges and not self.cuda:
            kinds["activations"] = max(kinds["activations"], self._dense())
        return self._phase("checkpoint", {"checkpoint": kinds})

    def _scratch(self, *, loss: bool) -> int:
        """Of the operators on the head, which have a budget whatever the number of tokens."""
        tokens = self.shape.rows * self.shape.completion
        causal = load_configuration(self.config.model).get_text_config()
        width, vocabulary = causal.hidden_size, causal.vocab_size
        if not self.cuda:
            budget = scratch_bytes(torch.device("cpu"))
            return budget + (4 * tokens * width if loss else 0)
        budget = int(self.machine.memory // SHARE_OF_A_GPU)
        if os.environ.get("FASTPPO_SCRATCH_MB"):
            budget = scratch_bytes()
        itemsize = self._gathered_size
        copied = vocabulary * width * itemsize if self.config.model.autocast and not self.sharded else 0
        logits = tokens * vocabulary * itemsize if loss else 0
        return min(budget, max(DEFAULT_SCRATCH_BYTES, copied + logits)) + tokens * width * (8 if loss else 2)
