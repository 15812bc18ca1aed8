"""Where completions end, against the text of every beginning decoded as a whole."""

from __future__ import annotations

import random

import pytest
from tiny import make_tiny_tokenizer

from fastppo.rollout.ending import Growing
from fastppo.rollout.engine import Sampling

transformers = pytest.importorskip("transformers")


def make_sentencepiece_tokenizer():
    """Pieces whose space is `▁`, bytes for all other characters; the decoder drops the first space."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "▁b", "ab", "bcd"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<s>")


def make_wordpiece_tokenizer():
    """The later pieces of a word begin with `##`, which the decoder writes if it sees no earlier one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<s>", "</s>", "?", *"abcdefgh", "bcd", *(f"##{letter}" for letter in "abcdefgh"), "##ab", "##bcd"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<s>")


TOKENIZERS = {
    "byte_level": make_tiny_tokenizer(),
    "sentencepiece": make_sentencepiece_tokenizer(),
    "wordpiece": make_wordpiece_tokenizer(),
}
TEXTS = ["ab ", "a b", "é", "🎉🙂", "日本", "h\n", "\n\n", "bcda", "</s>", "<|im_end|>", "  a", "gg", "##"]


def grown(sampling: Sampling, tokens: list[int]):
    growing = Growing(sampling)
    for token in tokens:
        growing.add(token, -1.0)
    return growing.completion


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_completion_ends_with_the_first_token_after_which_its_text_has_a_stop_string(name):
    """Strings across tokens and inside one, characters of several tokens, spaces first, unknown ids, broken bytes."""
    tokenizer, ended = TOKENIZERS[name], 0
    known = range(len(tokenizer))  # bytes first, the longest pieces last
    for _ in range(400):
        stop = tuple(random.sample(TEXTS, random.choice((1, 1, 3))))
        tokens = []
        while len(tokens) < 60:
            text = random.choice([*TEXTS, " ", "a", "🎉", "本"])
            tokens += tokenizer(text)["input_ids"]
            more = (random.choices(known[-16:], k=2), random.choices(known, k=2), [tokenizer.pad_token_id], [5000])
            tokens += random.choice([[], [], *more])
        del tokens[60:]
        texts = (tokenizer.decode(tokens[:n]) for n in range(1, 61))
        expected = next((n for n, text in enumerate(texts, 1) if any(x in text for x in stop)), None)
        completion = grown(Sampling(tokenizer, eos=[], max_new_tokens=60, stop=stop), tokens)
        assert completion.ended == (expected is not None), (stop, tokens)
        assert completion.tokens == tokens[:expected], (stop, tokens)
        assert len(completion.logprobs) == len(completion.tokens)
        ended += completion.ended
    assert 100 < ended < 400


def test_eos_the_stop_string_and_the_length_end_a_completion_whichever_is_first():
    tokenizer = TOKENIZERS["sentencepiece"]
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    sampling = Sampling(tokenizer, eos=[c, 7], max_new_tokens=4, stop=("ba",))
    for tokens, length, ended in (
        ([a, c, b, a], 2, True),
        ([a, 7, b, a], 2, True),
        ([a, b, a, c], 3, True),
        ([b, b, b, a, c], 4, True),  # the longest that may be
        ([a, a, a, b, a], 4, False),
    ):
        completion = grown(sampling, tokens)
        assert (completion.tokens, completion.ended) == (tokens[:length], ended)


def test_a_look_at_the_text_costs_the_same_however_long_the_completion_is(monkeypatch):
    tokenizer, decoded = make_tiny_tokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens, **options: decoded.append(len(tokens)) or decode(tokens))
    tokens = random.choices(range(3, tokenizer.vocab_size), k=400)
    grown(Sampling(tokenizer, eos=[], max_new_tokens=400, stop=("no such text", "</answer>")), tokens)
    assert 400 <= len(decoded) < 500
    assert max(decoded) < 50
