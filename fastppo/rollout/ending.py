"""Where a completion ends: after an EOS token, a stop string or `max_new_tokens`, whichever comes first."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fastppo.rollout.engine import Completion, Sampling


class Growing:
    """A completion while its tokens come, for engines that do not find its end themselves."""

    def __init__(self, sampling: Sampling) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.ended, self.goes_on = False, True
        self._eos, self._longest = frozenset(sampling.eos), sampling.max_new_tokens
        self._text = _Text(sampling.tokenizer, sampling.stop) if sampling.stop else None

    def add(self, token: int, logprob: float) -> bool:
        """Take the next token, unless the completion is over. Returns whether it goes on."""
        if self.goes_on:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.ended = token in self._eos or (self._text is not None and self._text.stops_at(token))
            self.goes_on = not self.ended and len(self.tokens) < self._longest
        return self.goes_on

    @property
    def completion(self) -> Completion:
        return Completion(self.tokens, self.logprobs, self.ended)


class _Text:
    """The end of a completion's text, special tokens included: as much as a stop string can still begin in.

    Tokens have no text of their own. A character may take several, some tokenizers drop a space at the start, and
    WordPiece writes `##` before the rest of a word whose beginning is missing. So every look decodes the last tokens
    from a place on where the text of those that follow is the same, and longer than any stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop, self._longest = tokenizer, stop, max(map(len, stop))
        self._tokens: list[int] = []
        # The tokens before this one go once what follows them is long enough.
        self._middle, self._middle_length = 0, 0

    def stops_at(self, token: int) -> bool:
        """Whether the text contains a stop string, now that it goes on with this token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        found = any(string in text for string in self._stop)
        # U+FFFD stands for a character that is not complete yet.
        if len(text) - self._middle_length > self._longest and not text.endswith("\ufffd"):
            rest = self._tokens[self._middle :]
            rest_text = self._decode(rest)
            if text.endswith(rest_text):  # else the middle is inside a word
                self._tokens, text = rest, rest_text
            self._middle, self._middle_length = len(self._tokens), len(text)
        return found

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
