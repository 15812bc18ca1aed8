"""Sample completions by vLLM, in this process, with weights of its own that every `sync` brings up to date."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastppo.models.head import causal_of
from fastppo.models.load import context_length
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.engine import Completion, Engine, Sampling

# One process: weights are handed over as they are, and `external_launcher` runs one engine in each rank.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads, too, would be bound to these cores
}
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class VLLMEngine(Engine):
    """One engine in each rank, or one that `tensor_parallel_size` ranks share.

    Args:
        config: the rollout section of the configuration.
        device: the policy's.
        max_length: tokens of the longest sequence, prompt and completion together; None for what the model can read.
        gpu_memory_utilization: share of the device's memory for vLLM, where `rollout.vllm` says nothing.
    """

    def __init__(
        self,
        config: RolloutConfig,
        device: torch.device,
        *,
        max_length: int | None = None,
        gpu_memory_utilization: float | None = None,
    ) -> None:
        self.config, self.device, self.max_length = config, device, max_length
        self.gpu_memory_utilization = config.vllm.gpu_memory_utilization or gpu_memory_utilization
        self._llm: Any = None

    def sync(self, policy: nn.Module) -> None:
        if self._llm is None:
            self._llm = self._open(policy)
        weights = iter(_weights(causal_of(policy)).items())
        with _torch_as_it_was():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self.device.type == "cpu":
                self._llm.collective_rpc(_lay_out_head)
        self._llm.reset_prefix_cache()  # whose keys and values are those of the weights before

    def _open(self, policy: nn.Module) -> Any:
        os.environ.update(_ENVIRONMENT)
        for name, value in (_DEFAULTS | _ALONE).items():
            os.environ.setdefault(name, value)
        causal = causal_of(policy)
        with tempfile.TemporaryDirectory() as folder, _torch_as_it_was():
            from vllm import LLM

            _save_configuration(causal, Path(folder))
            options = (
                {} if self.gpu_memory_utilization is None else {"gpu_memory_utilization": self.gpu_memory_utilization}
            )
            if self.device.type == "cpu" and self.gpu_memory_utilization is None:
                options["kv_cache_memory_bytes"] = 2**30
            return LLM(
                folder,
                skip_tokenizer_init=True,  # prompts are tokens
                generation_config="vllm",  # rather than what the model's own says of top-p and the like
                load_format="dummy",  # `sync` brings the weights
                dtype=_dtype(causal, self.device),
                max_model_len=min(filter(None, (self.max_length, context_length(causal))), default=None),
                logprobs_mode="processed_logprobs",  # with the temperature
                tensor_parallel_size=self.config.vllm.tensor_parallel_size,
                distributed_executor_backend="external_launcher",
                enforce_eager=self.config.vllm.enforce_eager or self.device.type == "cpu",
                enable_sleep_mode=self.device.type == "cuda",
                **options,
            )

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        keys: Tensor,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda ended: None,
    ) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for index, (prompt, key) in enumerate(zip(prompts, keys.tolist(), strict=True)):
            params = SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=sampling.eos,
                ignore_eos=True,  # those of `sampling` count, not the model's
                seed=key % 2**63,
                logprobs=0,  # of the sampled tokens alone
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        completions: dict[int, Completion] = {}
        while engine.has_unfinished_requests():
            before = len(completions)
            for request in engine.step():
                if request.finished:
                    completions[int(request.request_id)] = _completion(request.outputs[0])
            if len(completions) > before:
                progress(len(completions))
        return [completions[index] for index in range(len(prompts))]


def _lay_out_head(worker: Any) -> None:
    """On a CPU the head multiplies by a copy of its weight, which a reload forgets where the embeddings are tied."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    logprobs = [of[token].logprob for of, token in zip(output.logprobs, tokens, strict=True)]
    if not np.isfinite(logprobs).all():
        raise FloatingPointError("the policy's probabilities are not finite")
    return Completion(tokens, logprobs, output.finish_reason == "stop")


def _dtype(causal: nn.Module, device: torch.device) -> str:
    """The precision of the policy's products: that of autocast, where it is on."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else next(causal.parameters()).dtype
    return str(dtype).removeprefix("torch.")


def _weights(causal: nn.Module) -> dict[str, Tensor]:
    """The weights by the names and in the shapes of a checkpoint.

    From the parameters, since `state_dict` of a sharded model that is gathered would shard it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(causal, {name: p.detach() for name, p in causal.named_parameters()})


def _save_configuration(causal: nn.Module, folder: Path) -> None:
    causal.config.save_pretrained(folder)


@contextlib.contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """vLLM seeds the global generators, and on a CPU it replaces `torch.set_num_threads`."""
    python, numpy, set_threads, threads = (
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
        torch.set_num_threads,
        torch.get_num_threads(),
    )
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
