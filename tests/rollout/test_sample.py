"""Sampling by our own loop and by generate(): log-probabilities, token ids, and what is left of the model."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from fastppo.models import ModelError
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.draw import sequence_keys
from fastppo.rollout.engine import EngineError
from fastppo.rollout.generate import TransformersEngine
from fastppo.rollout.loop import LoopEngine
from fastppo.rollout.prompt import Prompt
from fastppo.rollout.sample import sample

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
KEYS = sequence_keys("test", 16)
CONFIG = RolloutConfig(max_new_tokens=6, temperature=0.8, generation_batch_size=3)


@pytest.fixture(params=[False, True], ids=["plain", "lora"])
def policy(request, tmp_path):
    """A model that ships with sampling defaults of its own."""
    path = make_tiny_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.update(top_k=1, repetition_penalty=3.0, suppress_tokens=[5], eos_token_id=[2, 7])
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if request.param:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2)).eval()
    return model, tokenizer


@pytest.fixture(params=[LoopEngine, TransformersEngine])
def engine(request):
    return request.param()


def generation_configs(model) -> list:
    return [(name, id(m.__dict__.get("generation_config"))) for name, m in model.named_modules()]


def test_recorded_logprobs_are_those_of_the_model_at_this_temperature(policy, engine):
    model, tokenizer = policy
    prompts = [Prompt("", torch.randint(3, 300, (length,)).tolist(), {}) for length in (2, 5, 3)]
    prompts = [prompt for prompt in prompts for _ in range(3)]
    before = generation_configs(model)
    rollout = sample(model, tokenizer, prompts, KEYS[: len(prompts)], CONFIG, engine=engine, device=CPU)
    assert generation_configs(model) == before
    assert rollout.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    length = rollout.mask.shape[1]
    positions = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            input_ids=rollout.sequences, attention_mask=rollout.attention_mask, position_ids=positions
        ).logits
    expected = (logits[:, -length - 1 : -1].double() / 0.8).log_softmax(-1)
    expected = expected.gather(-1, rollout.sequences[:, -length:, None]).squeeze(-1)
    torch.testing.assert_close(rollout.logprobs[rollout.mask].double(), expected[rollout.mask], rtol=1e-4, atol=1e-4)
    assert (rollout.logprobs[~rollout.mask] == 0).all()

    for row, prompt in enumerate(prompts):
        ids, tokens = rollout.sequences[row, :-length], rollout.sequences[row, -length:]
        assert ids[rollout.attention_mask[row, :-length].bool()].tolist() == prompt.input_ids
        ends = [i for i, token in enumerate(tokens.tolist()) if token in (2, 7)]
        assert rollout.ended[row] == bool(ends)
        assert rollout.mask[row].sum() == (ends[0] + 1 if ends else length)


def test_a_completion_depends_on_its_own_prompt_and_key(policy, engine):
    """In one batch, in halves, one by one, shuffled, beside longer prompts; in float64, since rounding may differ."""
    model, tokenizer = policy
    model.double()
    prompts = [Prompt("", torch.randint(3, 300, (length,)).tolist(), {}) for length in (2, 5, 3, 2, 9)]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    longer, keys = Prompt("", torch.randint(3, 300, (14,)).tolist(), {}), KEYS[: len(prompts)]

    def completions(rows, batch_size=64, beside=()):
        config = RolloutConfig(max_new_tokens=12, generation_batch_size=batch_size)
        given = [prompts[row] for row in rows] + [longer for _ in beside]
        options = {"engine": engine, "device": CPU, "eos_ids": list(range(60))}
        rollout = sample(model, tokenizer, given, torch.cat([keys[rows], KEYS[list(beside)]]), config, **options)
        tokens = rollout.sequences[:, -rollout.mask.shape[1] :]
        whole = zip(tokens, rollout.logprobs, rollout.mask, strict=True)
        return {
            row: (ids[real].tolist(), logprobs[real]) for row, (ids, logprobs, real) in zip(rows, whole, strict=False)
        }

    rows = list(range(len(prompts)))
    expected = completions(rows)
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == len(prompts)
    assert len({len(tokens) for tokens, _ in expected.values()}) > 1  # some end early
    shuffled = torch.randperm(len(rows)).tolist()
    for other in (
        completions(rows[:4]) | completions(rows[4:]),
        completions(rows, batch_size=1),
        completions(shuffled),
        completions(shuffled, batch_size=4),
        completions(rows, beside=(13, 14)),
    ):
        for row, (tokens, logprobs) in expected.items():
            assert other[row][0] == tokens
            torch.testing.assert_close(other[row][1], logprobs, rtol=1e-6, atol=1e-6)


def test_a_compiled_policy_is_sampled_by_this_configuration_alone(policy, engine):
    """torch.compile wraps the model, which still owns the generation config: greedy, with at most 20 tokens."""
    model, tokenizer = policy
    compiled = torch.compile(model, backend="eager")
    before = generation_configs(model)
    prompts = [Prompt("", [4, 5], {})] * 8
    rollout = sample(
        compiled,
        tokenizer,
        prompts,
        KEYS[: len(prompts)],
        CONFIG,
        engine=engine,
        device=CPU,
        eos_ids=[],
    )
    assert rollout.mask.shape == (8, 6)
    assert len(rollout.sequences.unique(dim=0)) > 1
    assert generation_configs(model) == before


def test_a_failure_restores_the_generation_config_and_names_what_is_not_finite(policy, engine):
    model, tokenizer = policy
    before = generation_configs(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(model, tokenizer, [Prompt("", [4], {})], KEYS[:1], CONFIG, engine=engine, device=CPU)
    assert generation_configs(model) == before


def test_an_added_pad_token_changes_nothing(policy, engine):
    """The tokenizer has a token more than the embedding has rows; some rows end early and are padded with it."""
    model, tokenizer = policy
    prompts = [Prompt("", torch.randint(3, 300, (length,)).tolist(), {}) for length in (2, 5, 3, 5)]
    rollouts = []
    for added in (False, True):
        if added:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            assert tokenizer.pad_token_id == model.get_input_embeddings().weight.shape[0]
        options = {"engine": engine, "device": CPU, "eos_ids": list(range(150))}
        rollouts.append(sample(model, tokenizer, prompts * 4, KEYS[:16], CONFIG, **options))
    own, added = rollouts
    assert own.ended.any()
    assert (~own.mask).any()
    real = own.attention_mask.bool()
    assert torch.equal(added.attention_mask, own.attention_mask)
    assert torch.equal(added.sequences[real], own.sequences[real])
    assert (added.sequences[~real] == tokenizer.pad_token_id).all()
    assert added.completions == own.completions


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([4, 331], r"token 331 has no embedding, the model has 331: .*resize_token_embeddings"),
        ([4, -1], "token -1 is below 0"),
        ([], "prompt 1 of the batch has no tokens"),
    ],
    ids=["no embedding", "negative", "empty"],
)
def test_a_prompt_that_cannot_be_read_is_refused(policy, engine, ids, message):
    model, tokenizer = policy
    prompts = [Prompt("", [4, 5], {}), Prompt("", ids, {})]
    with pytest.raises(ModelError, match=message):
        sample(model, tokenizer, prompts, KEYS[:2], CONFIG, engine=engine, device=CPU)


@pytest.mark.parametrize("eos", [0.5, "x", {}, [2, None]])
def test_a_strange_eos_token_id_is_refused(policy, engine, monkeypatch, eos):
    model, tokenizer = policy
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    with pytest.raises(ModelError, match=r"^the model's eos_token_id: expected .*, got"):
        sample(model, tokenizer, [Prompt("", [4], {})], KEYS[:1], CONFIG, engine=engine, device=CPU)


def test_progress_counts_the_completions_that_have_ended(policy, engine):
    model, tokenizer = policy
    prompts, told = [Prompt("", [3, 4, 5], {}) for _ in range(7)], []
    options = {"engine": engine, "device": CPU, "eos_ids": list(range(3, 150)), "progress": told.append}
    sample(model, tokenizer, prompts, KEYS[: len(prompts)], CONFIG, **options)
    assert told == sorted(told)
    assert {3, 6, 7} <= set(told)  # batches of three
    assert told[-1] == 7
    assert len(told) > 3


def test_a_stop_string_ends_a_completion_and_changes_nothing_before_its_end(policy, engine):
    """The engine stops decoding there, also where no completion is as long as it may be; the text keeps the string."""
    model, tokenizer = policy
    prompts = [Prompt("", torch.randint(3, 300, (length,)).tolist(), {}) for length in (2, 5, 3, 5)] * 4
    stop = ["e", "the", "a", "o", "\ufffd"]

    def rollout(**changes):
        config = RolloutConfig(max_new_tokens=20, generation_batch_size=7, **changes)
        return sample(model, tokenizer, prompts, KEYS, config, engine=engine, device=CPU)

    free, stopped = rollout(), rollout(stop=stop)
    width = stopped.mask.shape[1]
    assert width < free.mask.shape[1]
    for row, text in enumerate(stopped.completions):
        length = int(stopped.mask[row].sum())
        own = stopped.sequences[row, -width:][:length]
        assert torch.equal(own, free.sequences[row, -free.mask.shape[1] :][:length])
        torch.testing.assert_close(stopped.logprobs[row, :length], free.logprobs[row, :length], rtol=1e-4, atol=1e-4)
        assert stopped.ended[row]
        assert any(string in text for string in stop) or own[-1] in (2, 7)
        before = tokenizer.decode(own[:-1], skip_special_tokens=False)
        assert not any(string in before for string in stop)


def test_an_engine_sleeps_after_a_rollout_and_after_an_error(policy):
    """Whatever fails, the error that comes out is the first."""
    model, tokenizer = policy
    done = []

    class Recorded(LoopEngine):
        fails = ""

        def step(self, name):
            done.append(name)
            if name in self.fails:
                raise EngineError(f"{name} failed")

        def wake(self):
            self.step("wake")

        def sync(self, policy):
            self.step("sync")
            super().sync(policy)

        def sample(self, *arguments):
            self.step("sample")
            return super().sample(*arguments)

        def sleep(self):
            self.step("sleep")

    engine = Recorded()
    options = {"engine": engine, "device": CPU}
    sample(model, tokenizer, [Prompt("", [4], {})], KEYS[:1], CONFIG, **options)
    assert done == ["wake", "sync", "sample", "sleep"]
    for number, name in enumerate(("wake", "sync", "sample"), 1):
        done.clear()
        engine.fails = (name, "sleep")
        with pytest.raises(EngineError, match=f"^{name} failed"):
            sample(model, tokenizer, [Prompt("", [4], {})], KEYS[:1], CONFIG, **options)
        assert done == [*("wake", "sync", "sample")[:number], "sleep"]
