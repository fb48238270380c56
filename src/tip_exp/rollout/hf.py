"""Rollouts by transformers' `generate`: every machine, every model it knows; the reference for other backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from tip_exp.rollout.types import Rollout, Sampling


class _SampledLogprobs(LogitsProcessor):
    """Records each sampled token's log-prob: step t's token is seen at step t + 1, so one row of logits is kept."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self._previous: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.record(input_ids[:, -1])
        self._previous = scores.float().log_softmax(-1)
        return scores

    def record(self, sampled: Tensor) -> None:
        if self._previous is not None:
            self.columns.append(self._previous.gather(-1, sampled[:, None]).squeeze(-1))
            self._previous = None


class HfSampler:
    """Samples from the very module the learner trains, so its weights are always the newest."""

    def __init__(self, model: PreTrainedModel, *, stop_ids: list[int], pad_id: int, batch_size: int) -> None:
        self.model, self.stop_ids, self.pad_id, self.batch_size = model, stop_ids, pad_id, batch_size

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        """Rollouts, prompt-major. The same seed, prompts and weights give the same rollouts."""
        torch.manual_seed(seed)
        expanded = [prompt for prompt in prompts for _ in range(sampling.samples)]
        rollouts: list[Rollout] = []
        with self._for_generation():
            for start in range(0, len(expanded), self.batch_size):
                rollouts += self._generate_batch(expanded[start : start + self.batch_size], sampling)
        return rollouts

    def sync(self) -> None:
        pass  # the learner's module is sampled from

    def close(self) -> None:
        pass

    @contextmanager
    def _for_generation(self) -> Iterator[None]:
        """`generate` fills every unset option from model.generation_config (Qwen ships T 0.7, top-k 20): hide it."""
        own, training = self.model.generation_config, self.model.training
        self.model.generation_config = GenerationConfig()
        self.model.eval()
        try:
            yield
        finally:
            self.model.generation_config = own
            self.model.train(training)

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left: new tokens follow the prompt
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        logprobs = _SampledLogprobs()
        output = self.model.generate(  # pyright: ignore[reportCallIssue]
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                pad_token_id=self.pad_id,
                eos_token_id=self.stop_ids,
                **options,
            ),
            logits_processor=LogitsProcessorList([logprobs]),
        )
        assert isinstance(output, Tensor)
        logprobs.record(output[:, -1])
        new_ids = output[:, width:].tolist()
        new_logprobs = torch.stack(logprobs.columns, dim=1).tolist()
        return [self._rollout(*row) for row in zip(prompts, new_ids, new_logprobs, strict=True)]

    def _rollout(self, prompt: list[int], ids: list[int], logprobs: list[float]) -> Rollout:
        """Cut after the first stop token, which is part of the response; without one the response was truncated."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), None)
        length = len(ids) if end is None else end
        return Rollout(
            token_ids=prompt + ids[:length],
            response_mask=[False] * len(prompt) + [True] * length,
            finish="length" if end is None else "stop",
            sampler_logprobs=logprobs[:length],
        )
