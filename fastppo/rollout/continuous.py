"""Sample completions by transformers' continuous batching, on the very weights that are trained.

A place that a short completion leaves is taken by the next prompt at once, where `generate()` computes padding until
the longest completion of its batch has ended. Keys and values are in pages that all sequences share.

Its thread does not see autocast, so float32 weights are sampled in float32. The random numbers are those of the
device's generator, seeded with the sequences' keys: the same call gives the same completions, but a completion
depends on those beside it, and with stop strings on when their end was noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fastppo.errors import one_line
from fastppo.models.attention import PAGED, VARLEN
from fastppo.models.head import causal_of
from fastppo.models.load import caps_attention
from fastppo.rollout.check import found_wrong
from fastppo.rollout.ending import Growing
from fastppo.rollout.engine import Completion, Engine, EngineError, Sampling

try:
    from transformers import ContinuousBatchingConfig
except ImportError:  # transformers 4
    ContinuousBatchingConfig = None

MOST_TOKENS = 1024  # of a forward pass; a dense mask has as many rows, and a column for every token in the cache
_OPTIONS = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)} if ContinuousBatchingConfig else set()
_PAGE = "page_size" if "page_size" in _OPTIONS else "block_size"  # transformers before 5.23
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def why_not(policy: nn.Module | None = None) -> str | None:
    """Why continuous batching cannot sample from this policy, or with this transformers; None if it can.

    Some architectures bring attention of their own to the same interface, so it samples two tokens to see. All ranks
    that share a sharded policy must call.
    """
    if not {"return_logprobs", _PAGE} <= _OPTIONS:
        return "this transformers does not return its log-probabilities (5.17 does)"
    if policy is None:
        return None
    causal = _causal_of(policy)
    config = causal.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if not causal._can_set_attn_implementation() or getattr(causal, "_is_stateful", False) or layers - _LAYER_TYPES:
        return "this model keeps other states than the keys and values of transformers' attention functions"
    if len(layers) > 1 and _PAGE != "page_size":
        return "transformers before 5.23 pages no model of which some layers have a window and others none"
    if caps_attention(causal):
        return "this model caps its attention scores"
    with policy.gathered() if hasattr(policy, "gathered") else contextlib.nullcontext():
        engine = ContinuousEngine()
        engine.sync(policy)
        try:
            return found_wrong(engine, policy)
        except (EngineError, FloatingPointError) as error:
            return f"it fails for this model ({one_line(error.__cause__ or error, 200)})"


def cache_tokens(sequences: int, length: int, page: int = 32) -> int:
    """Tokens that the cache has room for.

    Args:
        sequences: that are decoded together: `rollout.generation_batch_size`, or all if they are fewer.
        length: of the longest prompt and `max_new_tokens`.
    """
    # Where layers have a window or none, pages come in groups, which leaves a rest of each sequence's last one unused.
    return sequences * (math.ceil(length / page) + 1) * page


class ContinuousEngine(Engine):
    policy: nn.Module

    def sync(self, policy: nn.Module) -> None:
        self.policy = policy

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        keys: Tensor,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda ended: None,
    ) -> list[Completion]:
        causal, rows = _causal_of(self.policy), [Growing(sampling) for _ in prompts]
        with _fit_for_pages(causal) as attention, _finite_logits(causal) as damaged, _seeded(causal.device), _quietly():
            config = _config(attention, prompts, keys, sampling)
            if causal.device.type == "cuda":  # its stream does not wait for the one that has updated the weights
                torch.cuda.synchronize(causal.device)
            try:
                # One of its own for each rollout: another would find prompts' keys and values of older weights.
                manager = causal.init_continuous_batching(_generation(sampling), config)
                # Their order in the first passes must not depend on a race with its thread.
                for number, prompt in enumerate(prompts):
                    stop = {"streaming": bool(sampling.stop), "eos_token_id": sampling.eos}
                    manager.add_request(prompt, str(number), sampling.max_new_tokens, **stop)
                try:
                    manager.warmup()  # CUDA graphs, where it takes them
                    manager.start()
                    _collect(manager, rows, progress)
                finally:
                    manager.stop(hard_stop=True)
                    manager.destroy()
            except (RuntimeError, ValueError, TypeError, MemoryError, KeyError, AttributeError) as error:
                raise EngineError(
                    f"continuous batching failed ({one_line(error, 200)}); lower rollout.generation_batch_size if "
                    "memory is short, or set rollout.engine to transformers"
                ) from error
        if damaged.item():
            raise FloatingPointError("the policy's probabilities are not finite")
        return [row.completion for row in rows]


def _collect(manager, rows: list[Growing], progress: Callable[[int], None]) -> None:
    """Take what the manager's thread gives out until every completion has ended."""
    ended = 0
    while ended < len(rows):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("its thread ended too early")
            continue
        if result.error is not None:
            raise RuntimeError(result.error)
        row = rows[int(result.request_id)]
        if not row.goes_on:  # a token that was on its way when the stop string was found
            continue
        known = len(row.tokens)
        for token, logprob in zip(result.generated_tokens[known:], result.logprobs[known:], strict=True):
            row.add(token, logprob)
        if not row.goes_on:
            ended += 1
            progress(ended)
            if not result.is_finished():
                manager.cancel_request(result.request_id)


def _generation(sampling: Sampling) -> GenerationConfig:
    """The whole of it: nothing of the model's own sampling defaults."""
    options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(**options, max_new_tokens=sampling.max_new_tokens, eos_token_id=sampling.eos or -1)


def _config(attention: str, prompts: list[list[int]], keys: Tensor, sampling: Sampling) -> ContinuousBatchingConfig:
    together = min(sampling.batch_size, len(prompts))
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    of_flash_attn = "flash_attention" in attention
    page = 256 if of_flash_attn else 32
    options = {
        _PAGE: page,
        "num_blocks": cache_tokens(together, longest, page) // page,
        "max_batch_tokens": max(together, min(MOST_TOKENS, sum(map(len, prompts)))),
        "max_requests_per_batch": together,
        "max_blocks_per_request": math.ceil(longest / page) + 1 if of_flash_attn else 0,  # which alone reads pages
        "safety_margin": 0.0,  # there is room for `together` sequences of any length
        "return_logprobs": True,
        "seed": int.from_bytes(hashlib.blake2b(keys.cpu().numpy().tobytes(), digest_size=4).digest(), "big"),
        "auto_switch_to_flash": False,  # which would ask the Hub for kernels
        "disable_nccl_graph_mixing": False,  # it writes to the environment
    }
    return ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in _OPTIONS})


@contextlib.contextmanager
def _fit_for_pages(causal: nn.Module) -> Iterator[str]:
    """Attention that takes pages, in place of the model's own."""
    before, training = causal.config._attn_implementation, causal.training
    attention = _paged(before, causal.dtype)
    try:
        causal.config._attn_implementation = attention  # its setter would look for flash-attn, and ask the Hub
        yield attention
    finally:
        causal.config._attn_implementation = before
        causal.train(training)  # the manager sets eval mode


def _paged(attention: str, dtype: torch.dtype) -> str:
    if attention == "eager":
        return "paged|eager"
    if dtype not in (torch.bfloat16, torch.float16):  # FlashAttention has no float32
        attention = "sdpa"
    elif attention == VARLEN:
        attention = PAGED
    elif not attention.startswith("flash_attention"):
        attention = "sdpa"
    return attention if _PAGE == "page_size" else f"paged|{attention}"


@contextlib.contextmanager
def _finite_logits(causal: nn.Module) -> Iterator[Tensor]:
    """Yield a flag that is set once a row of logits is not finite, and replace that row: drawing from it would be an
    assertion on the device, after which a CUDA process is lost."""
    damaged = torch.zeros((), dtype=torch.bool, device=causal.device)

    def look(_, args: tuple, given: dict, output) -> None:
        logits = output.logits
        if "logits_to_keep" not in given:  # other rows may be padding
            logits = logits[:, given["logits_indices"]]
        bad = ~logits.amax(-1, keepdim=True).isfinite()
        damaged.logical_or_(bad.any())
        if "logits_to_keep" in given:
            logits.masked_fill_(bad, 0.0)
        else:
            output.logits[:, given["logits_indices"]] = logits.masked_fill(bad, 0.0)

    hook = causal.register_forward_hook(look, with_kwargs=True)
    try:
        yield damaged
    finally:
        hook.remove()


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were: the manager seeds them for the whole process."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The manager's thread logs tracebacks of the errors that `sample` raises."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _causal_of(policy: nn.Module) -> nn.Module:
    causal = causal_of(policy)
    return getattr(causal, "_orig_mod", causal)  # of torch.compile, whose graphs have other inputs
