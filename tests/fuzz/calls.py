"""Random calls of the public operators: inputs of every layout and precision, ordinary and extreme."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from fastppo.engines.dispatch import BACKENDS, unusable
from tests.fuzz.expected import logits_of

CPU, NAN, INF, ZERO = torch.device("cpu"), float("nan"), float("inf"), torch.zeros(())
LOSS_AGGS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


class Draw(random.Random):
    """Random numbers, tensors and layouts of one case."""

    def __init__(self, case: int) -> None:
        super().__init__(case)
        self.generator = torch.Generator().manual_seed(case)

    def chance(self, p: float) -> bool:
        return self.random() < p

    def pick(self, items: Any) -> Any:
        return self.choice(list(items))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """Of any density, 0 and 1 included; most rows have one of their own."""
        density = torch.rand((*shape[:-1], 1), generator=self.generator) if len(shape) > 1 else self.random()
        return torch.rand(shape, generator=self.generator) < self.pick([density, density, density, 0.0, 1.0])

    def layout(self, x: Tensor | None) -> Tensor | None:
        """The same values, perhaps with other strides or a storage that starts elsewhere."""
        kind = self.randrange(5)
        if x is None or kind < 2 or not x.numel():
            return x
        if kind == 2 and x.dim() > 1:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == 3:
            wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1]) if x.dim() else x
            return wide[..., ::2].copy_(x) if x.dim() else x
        flat = x.new_zeros(x.numel() + 3)
        return flat[3:].view(x.shape).copy_(x)


class Call:
    """An operator, its arguments, and what the oracle needs to know of them."""

    def __init__(self, draw: Draw, op: str) -> None:
        self.op, self.args = op, {}
        dtypes = [torch.float32] * 4 + [torch.bfloat16] * 2 + [torch.float16, torch.float64]
        self.dtype = draw.pick(dtypes)
        self.lead = draw.pick(
            [(draw.randrange(0, 40),)] * 3 + [(draw.randrange(0, 6), draw.randrange(0, 12))] * 6 + [(2, 1, 3), (0, 4)]
        )
        self.mask = torch.ones(self.lead, dtype=torch.bool)

    def backends(self, draw: Draw) -> list[str | None]:
        names = [n for n in BACKENDS.get(self.op, ()) if unusable(n, CPU, self.dtype) is None]
        names.sort(key=lambda name: name != "reference")  # whose error is part of the others' bound
        # The interpreter is slow, and wrong about bfloat16, which it takes for integers.
        slow = self.dtype == torch.bfloat16 or draw.chance(0.7)
        return [None] if not names else [n for n in names if n != "triton" or not slow]

    @property
    def vocab(self) -> int:
        return self.args["logits" if "logits" in self.args else "weight"].shape[-1 if "logits" in self.args else 0]

    def leaves(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.args.items() if isinstance(x, Tensor) and x.requires_grad}


def random_head(draw: Draw, call: Call, vocab: int, prefix: str = "") -> None:
    """hidden, weight and bias, ordinary or extreme."""
    dim = draw.pick([1, 3, 8, 17, 33, 64, 100])
    scale = draw.pick([1.0, 1.0, 1.0, 3.0, 3.0, 0.0, 1e-6, 30.0, 1e3] + [1e-30, 1e5] * (call.dtype != torch.float16))
    hidden, weight = scale * draw.randn(*call.lead, dim), draw.randn(vocab, dim) / math.sqrt(dim)
    bias = draw.randn(vocab) if draw.chance(0.5) else None
    if draw.chance(0.2):
        weight[draw.randrange(vocab)] = weight[0]  # a tie
    if bias is not None and draw.chance(0.15):
        bias += draw.pick([1e4, -1e4])
    if bias is not None and vocab > 1 and draw.chance(0.15):  # tokens that cannot occur; one always can
        bias[torch.rand(vocab, generator=draw.generator) < draw.random()] = -INF
        bias[draw.randrange(vocab)] = 0.0
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            call.args[prefix + name] = draw.layout(x.to(call.dtype)).detach()


def random_transform(draw: Draw, call: Call) -> None:
    if draw.chance(0.4):
        call.args["temperature"] = draw.pick([0.3, 0.7, 1.0, 2.5])
    if draw.chance(0.3):
        call.args["logit_scale"] = draw.pick([0.1, 2.0, 1.0])
        if not any((call.args.get(name, ZERO) == -INF).any() for name in ("bias", "ref_bias")):
            call.args["logit_scale"] *= draw.pick([1, -1])
    if draw.chance(0.3):
        call.args["softcap"] = draw.pick([3.0, 30.0, 1e5])


def random_targets(draw: Draw, call: Call, vocab: int, possible: Tensor) -> None:
    """Tokens that can occur, `ignore_index` and, where they do not count, anything."""
    ids = possible.nonzero().flatten()
    targets = ids[torch.randint(len(ids), call.lead, generator=draw.generator)]
    ignored = ~draw.mask(call.lead) if draw.chance(0.4) else ~call.mask
    index = -100
    if call.op in ("linear_logprob", "selective_logprob") and draw.chance(0.3):
        index = call.args["ignore_index"] = draw.pick([-1, vocab, 2**31 - 1, 0])
    if call.op in ("linear_ppo_loss", "ppo_loss"):
        call.mask = call.mask & ~ignored
    else:
        call.mask = targets.masked_fill(ignored, index) != index
    targets = targets.masked_fill(ignored, index)
    call.args["targets"] = draw.layout(targets.to(draw.pick([torch.int64, torch.int32])))


def fill_padding(draw: Draw, call: Call, *names: str) -> None:
    """NaN, Inf or nothing where a token does not count."""
    for name in names:
        if (x := call.args.get(name)) is not None and draw.chance(0.7):
            mask = call.mask if x.dim() == call.mask.dim() else call.mask.unsqueeze(-1)
            call.args[name] = draw.layout(x.masked_fill(~mask, draw.pick([NAN, INF, -INF, 0.0])))


def require_gradients(draw: Draw, call: Call, *names: str) -> None:
    for name in names:
        if call.args.get(name) is not None and draw.chance(0.85):
            call.args[name] = call.args[name].detach().requires_grad_()


def random_vocab(draw: Draw) -> int:
    return draw.pick([1, 2, 7, 31, 64, 97, 129, 257, 600])


def possible_tokens(call: Call) -> Tensor:
    bias = call.args.get("bias")
    return torch.ones(call.vocab, dtype=torch.bool) if bias is None else bias > -INF


def linear_logprob(draw: Draw) -> Call:
    call = Call(draw, "linear_logprob")
    random_head(draw, call, random_vocab(draw))
    random_transform(draw, call)
    random_targets(draw, call, call.vocab, possible_tokens(call))
    call.args["return_entropy"] = draw.chance(0.7)
    fill_padding(draw, call, "hidden")
    require_gradients(draw, call, "hidden", "weight", "bias")
    return call


def selective_logprob(draw: Draw) -> Call:
    call = Call(draw, "selective_logprob")
    random_logits(draw, call, "logits")
    random_transform(draw, call)
    random_targets(draw, call, call.vocab, torch.ones(call.vocab, dtype=torch.bool))
    call.args["return_entropy"] = draw.chance(0.7)
    fill_padding(draw, call, "logits")
    require_gradients(draw, call, "logits")
    if draw.chance(0.3) and call.args["logits"].is_contiguous():
        call.args["inplace_backward"] = True
    return call


def random_logits(draw: Draw, call: Call, name: str) -> None:
    vocab = call.args["logits"].shape[-1] if "logits" in call.args else random_vocab(draw)
    x = draw.randn(*call.lead, vocab) * draw.pick([1.0, 3.0, 3.0, 0.0, 30.0, 1e3])
    call.args[name] = draw.layout((x + draw.pick([0.0, 0.0, 0.0, 1e4, -1e4])).to(call.dtype))


def linear_kl(draw: Draw) -> Call:
    call = Call(draw, "linear_kl")
    vocab = random_vocab(draw)
    random_head(draw, call, vocab)
    if draw.chance(0.2):  # the model with itself
        call.args |= {f"ref_{name}": x.clone() for name, x in call.args.items()}
    else:
        random_head(draw, call, vocab, "ref_")
        for name in ("bias", "ref_bias"):  # where one excludes a token and the other does not, the KL is infinite
            if name in call.args:
                call.args[name] = call.args[name].clamp(min=-1e4)
    random_transform(draw, call)
    call.args["kind"] = draw.pick(["reverse", "forward"])
    if draw.chance(0.6):
        call.args["mask"] = call.mask = draw.mask(call.lead)
    fill_padding(draw, call, "hidden", "ref_hidden")
    require_gradients(draw, call, "hidden", "weight", "bias")
    return call


def random_loss(draw: Draw, call: Call, *, exact: bool) -> None:
    """Options, sampled tokens and advantages; logp must be known, so that ratios are near 1."""
    args = call.args
    if draw.chance(0.6):
        args["clip_low"], args["clip_high"] = draw.uniform(0, 0.5), draw.uniform(0, 0.5)
    if draw.chance(0.3):
        args["dual_clip"] = draw.uniform(1.01, 4)
    if draw.chance(0.5):
        args["entropy_coef"] = draw.pick([0.01, -0.02, 1.0])
    if len(call.lead) > 1 and draw.chance(0.7):
        args["loss_agg"] = draw.pick(LOSS_AGGS)
        args["ratio_level"] = draw.pick(["token", "token", "sequence", "sequence-geometric"])
    if draw.chance(0.5):
        args["kl_coef"] = draw.pick([0.0, 0.05, 1.0])
        args["kl_estimator"] = draw.pick(["k1", "k2", "k3"] + ["exact"] * exact)
    z = logits_of(call, call.args)[0] if call.op == "linear_ppo_loss" or "logits" in args else None
    if z is None:
        now = args["logprobs"].double()
    else:
        now = torch.zeros(call.lead, dtype=torch.float64)
        now[call.mask] = (
            torch.log_softmax(z, -1).gather(-1, args["targets"][call.mask].long().unsqueeze(-1)).squeeze(-1)
        )
    spread = draw.pick([0.0, 0.1, 0.3, 3.0])
    precise = draw.pick([torch.float32, torch.float32, call.dtype])
    args["old_logprobs"] = (now + spread * draw.randn(*call.lead)).to(precise)
    args["advantages"] = (draw.pick([1.0, 0.0, 1e3]) * draw.randn(*call.lead)).to(precise)
    if args.get("kl_estimator", "exact") != "exact":
        args["ref_logprobs"] = (now + spread * draw.randn(*call.lead)).to(precise)
    if draw.chance(0.3):
        args["importance_weights"] = draw.randn(*call.lead).clamp(0.0, 1.0).to(precise)
    fill_padding(draw, call, "old_logprobs", "advantages", "ref_logprobs", "importance_weights")


def linear_ppo_loss(draw: Draw) -> Call:
    call = Call(draw, "linear_ppo_loss")
    vocab = random_vocab(draw)
    random_head(draw, call, vocab)
    random_transform(draw, call)
    random_mask(draw, call)
    random_targets(draw, call, vocab, possible_tokens(call))
    random_loss(draw, call, exact=True)
    if call.args.get("kl_estimator") == "exact" or draw.chance(0.1):
        random_head(draw, call, vocab, "ref_")
        for name in ("bias", "ref_bias"):
            if name in call.args:
                call.args[name] = call.args[name].clamp(min=-1e4)
    fill_padding(draw, call, "hidden", "ref_hidden")
    require_gradients(draw, call, "hidden", "weight", "bias")
    return call


def random_mask(draw: Draw, call: Call) -> None:
    if draw.chance(0.7):
        call.mask = draw.mask(call.lead)
        call.args["mask"] = draw.layout(call.mask.to(draw.pick([torch.bool, torch.bool, torch.float32, torch.int64])))


def ppo_loss(draw: Draw) -> Call:
    call = Call(draw, "ppo_loss")
    random_mask(draw, call)
    if draw.chance(0.6):
        random_logits(draw, call, "logits")
        random_transform(draw, call)
        random_targets(draw, call, call.vocab, torch.ones(call.vocab, dtype=torch.bool))
        random_loss(draw, call, exact=True)
        if call.args.get("kl_estimator") == "exact":
            random_logits(draw, call, "ref_logits")
        fill_padding(draw, call, "logits", "ref_logits")
    else:
        call.args["logprobs"] = -draw.randn(*call.lead).abs().to(call.dtype)
        call.args["entropy"] = draw.randn(*call.lead).abs().to(call.dtype)
        random_loss(draw, call, exact=False)
        fill_padding(draw, call, "logprobs", "entropy")
    require_gradients(draw, call, "logits", "logprobs", "entropy")
    return call


def fisher_vector_product(draw: Draw) -> Call:
    call = Call(draw, "fisher_vector_product")
    random_head(draw, call, random_vocab(draw))
    args = call.args
    if "bias" in args:
        args["bias"] = args["bias"].clamp(min=-1e4)
    random_transform(draw, call)
    args["d_hidden"] = draw.layout(draw.randn(*args["hidden"].shape).to(call.dtype))
    for name in ("weight", "bias"):
        if name in args and draw.chance(0.5):
            args[f"d_{name}"] = draw.layout(draw.randn(*args[name].shape).to(call.dtype))
    if draw.chance(0.6):
        args["mask"] = call.mask = draw.mask(call.lead)
    if draw.chance(0.5):
        args["row_weights"] = draw.randn(*call.lead).float()
    fill_padding(draw, call, "hidden", "d_hidden", "row_weights")
    return call


def gae(draw: Draw) -> Call:
    call = Call(draw, "gae")
    args, sequences = call.args, draw.randrange(0, 6)
    if draw.chance(0.5):
        lengths = [draw.randrange(0, 70) for _ in range(sequences)] or [0]
        call.lead, sequences = (sum(lengths),), len(lengths)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        args["cu_seqlens"] = offsets.to(draw.pick([torch.int32, torch.int64]))
    else:
        call.lead = (sequences, draw.pick([0, 1, 7, 16, 33, 300]))
    call.mask = torch.ones(call.lead, dtype=torch.bool)
    args["rewards"] = draw.layout(3 * draw.randn(*call.lead).to(call.dtype))
    args["values"] = draw.layout(
        draw.pick([0.1, 10.0]) * draw.randn(*call.lead).to(draw.pick([call.dtype, torch.float32]))
    )
    args["gamma"], args["lam"] = draw.pick([1.0, 0.99, 0.5, 0.0]), draw.pick([1.0, 0.95, 0.3, 0.0])
    random_mask(draw, call)
    if draw.chance(0.5):
        args["dones"] = draw.layout(torch.rand(call.lead, generator=draw.generator) < 0.1)
    if draw.chance(0.5):
        args["bootstrap"] = draw.layout(draw.randn(sequences).to(call.dtype))
    args["whiten"] = draw.chance(0.3)
    fill_padding(draw, call, "rewards", "values")
    return call


def value_loss(draw: Draw) -> Call:
    call = Call(draw, "value_loss")
    random_mask(draw, call)
    args = call.args
    args["values"], args["returns"] = (draw.layout(draw.randn(*call.lead).to(call.dtype)) for _ in range(2))
    args["cliprange_value"] = draw.pick([None, draw.uniform(0.01, 1)])
    if args["cliprange_value"] is not None:
        args["old_values"] = draw.randn(*call.lead).float()
    if len(call.lead) > 1:
        args["loss_agg"] = draw.pick(LOSS_AGGS)
    fill_padding(draw, call, "values", "returns", "old_values")
    require_gradients(draw, call, "values")
    return call


def whiten(draw: Draw) -> Call:
    call = Call(draw, "whiten")
    random_mask(draw, call)
    call.args["x"] = draw.layout(
        (draw.pick([1.0, 1e-2, 1e3]) * draw.randn(*call.lead) + draw.pick([0, 1])).to(call.dtype)
    )
    call.args["shift_mean"] = draw.chance(0.5)
    fill_padding(draw, call, "x")
    return call


CALLS = [linear_logprob, linear_kl, linear_ppo_loss, linear_ppo_loss, selective_logprob, ppo_loss]
CALLS += [fisher_vector_product, gae, value_loss, whiten]
