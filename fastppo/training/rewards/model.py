"""A sequence-classification model as a reward."""

from __future__ import annotations

import itertools
import sys

import torch

from fastppo.models import readable_ids
from fastppo.models.config import ModelConfig
from fastppo.models.load import ModelError, context_length, load_pretrained, resolve
from fastppo.training.config import RewardConfig
from fastppo.training.rewards.functions import RewardError


class ModelReward:
    """One logit of a sequence-classification model that reads prompt and completion as one text.

    A text longer than the model's context is truncated on the left, so that the completion stays.

    Args:
        config: with `model`, and `label` where the model has several.
        device: device that the model runs on.
        defaults: its dtype and permissions hold for the reward model too.

    Raises:
        RewardError: the model cannot be loaded, or `label` does not fit it.
    """

    def __init__(self, config: RewardConfig, *, device: torch.device | str, defaults: ModelConfig) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            source = resolve(config.model, allow_download=defaults.allow_download)
            if source.gguf_file:
                raise ModelError(f"{config.model}: a reward model cannot be a GGUF file")
            self.tokenizer = load_pretrained(AutoTokenizer, source, defaults)
            self.model = load_pretrained(
                AutoModelForSequenceClassification, source, defaults, dtype=getattr(torch, defaults.dtype)
            )
        except ModelError as error:
            raise RewardError(f"reward {config.name!r}: {error}") from error
        labels = self.model.config.num_labels
        if config.label is None and labels > 1:
            names = [f"{index} ({self.model.config.id2label.get(index)})" for index in range(labels)]
            raise RewardError(f"reward {config.name!r}: give the label of {config.model}: one of {', '.join(names)}")
        self.label = config.label or 0
        if self.label >= labels:
            raise RewardError(f"reward {config.name!r}: label {self.label}, but {config.model} has {labels}")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Such a tokenizer would add a second one to the text of a chat template, which begins with its own.
        bos = self.tokenizer.bos_token_id
        self.adds_bos = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        self.max_length = min(self.tokenizer.model_max_length, context_length(self.model) or sys.maxsize)
        self.batch_size = config.batch_size
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if self.adds_bos:
            texts = [text.removeprefix(self.tokenizer.bos_token) for text in texts]
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(texts[start : start + self.batch_size], **options)
            ids, real = batch["input_ids"], batch["attention_mask"].bool()
            readable_ids(self.model, ids, real)
            # A decoder looks for padding to find its last token, so no token of the batch may be equal to it; the
            # tokenizer's own pad token may be one of them, or have no embedding.
            pad = next(token for token in itertools.count() if token not in ids[real])
            self.model.config.get_text_config().pad_token_id = pad
            batch["input_ids"] = ids.masked_fill(~real, pad)
            logits = self.model(**batch.to(self.model.device)).logits  # [b, labels]
            scores += logits[:, self.label].float().tolist()
        return scores
