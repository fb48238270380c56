"""Rollouts by the very module the learner trains: every machine, every causal model of transformers; the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tip_exp.types import Rollout, Sampling

# Share of a batch's responses that must have ended before they leave it: leaving copies what stays of the cache.
LEAVE_TOGETHER = 0.1


class HfSampler:
    """Samples from the learner's module, so its weights are always the newest.

    A loop of its own, not `generate`, which keeps ended responses in the batch to the last one's end, and at the
    embedded pair's size spends a third of its time around the model; nothing of model.generation_config is read.
    """

    def __init__(self, model: PreTrainedModel, *, stop_ids: list[int], pad_id: int, batch_size: int) -> None:
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size
        self.stop_ids = torch.tensor(stop_ids, device=model.device)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        """Rollouts, prompt-major. The same seed, prompts and weights give the same rollouts."""
        torch.manual_seed(seed)
        expanded = [prompt for prompt in prompts for _ in range(sampling.samples)]
        rollouts: list[Rollout] = []
        with torch.no_grad(), self._evaluating():
            for start in range(0, len(expanded), self.batch_size):
                rollouts += self._generate_batch(expanded[start : start + self.batch_size], sampling)
        return rollouts

    def sync(self) -> None:
        pass  # the learner's module is sampled from

    def close(self) -> None:
        pass

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        device, width, most = self.model.device, max(map(len, prompts)), sampling.max_tokens
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.ones(len(prompts), width + most, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padded on the left: new tokens follow the prompt
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, : width - len(prompt)] = 0
        ids, mask = ids.to(device), mask.to(device)
        places = (mask.cumsum(-1) - 1).clamp_(min=0)
        written = torch.full((len(prompts), most), self.pad_id, device=device)
        logprobs = torch.zeros(len(prompts), most, device=device)
        lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        # Rows of the batch that are still there, and what the model has seen of them.
        here, cache, start, warpers = torch.arange(len(prompts), device=device), None, 0, _warpers(sampling)
        for step in range(most):
            end = width + step
            output = self.model(
                input_ids=ids,
                attention_mask=mask[here, :end],
                position_ids=places[here, start:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, start, logits = output.past_key_values, end, output.logits[:, -1].float()
            # One number a prompt, ended or not: a response's chance does not hang on when others end.
            chance = torch.rand(len(prompts), dtype=torch.float64, device=device)[here]
            tokens = _draw(warpers(ids, logits), chance) if sampling.temperature > 0 else logits.argmax(-1)
            written[here, step] = tokens
            logprobs[here, step] = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            lengths[here] += ~stopped[here]
            stopped[here] |= torch.isin(tokens, self.stop_ids)
            ids, going = tokens[:, None], ~stopped[here]
            num_going = int(going.sum())
            if num_going == 0:
                break
            if len(here) - num_going >= LEAVE_TOGETHER * len(here):
                cache.batch_select_indices(going.nonzero().squeeze(-1))
                here, ids = here[going], ids[going]
        rows = zip(prompts, written.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        return [_rollout(*row) for row in rows]


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own, in its order; none where a setting changes nothing."""
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _draw(logits: Tensor, chance: Tensor) -> Tensor:
    """The tokens, (n,), at which the cumulated probabilities pass `chance`, (n,) in [0, 1).

    In float64, where rounding favours no token of a large vocabulary, and one number a row is drawn, not V.
    """
    cumulated = logits.double().softmax(-1).cumsum_(-1)
    # Of the last sum, which is one but for rounding, so that no token of probability zero behind it is drawn.
    passed = torch.searchsorted(cumulated, (chance * cumulated[:, -1])[:, None], right=True)
    return passed.squeeze(-1)


def _rollout(prompt: list[int], ids: list[int], logprobs: list[float], length: int, stopped: bool) -> Rollout:
    """The first stop token is part of the response; without one the response was truncated."""
    return Rollout(
        token_ids=prompt + ids[:length],
        response_mask=[False] * len(prompt) + [True] * length,
        finish="stop" if stopped else "length",
        sampler_logprobs=logprobs[:length],
    )
