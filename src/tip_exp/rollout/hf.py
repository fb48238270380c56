"""Rollouts by transformers, sampled from the module that the learner trains: any device, any causal model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tip_exp.models.lora import merged_tensors
from tip_exp.models.weight_files import plain_copy
from tip_exp.types import Part, Rollout, Sampling

# The KV cache's name in a model's arguments and output: transformers 5.16 has past_key_values, 5.24 has cache.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Finished responses leave the batch once they are this share of it; each removal copies the remaining KV cache.
MIN_FINISHED_SHARE = 0.1
# A bar of responses, of rollouts and evaluations that take longer than the delay, in seconds.
progress_bar = partial(tqdm, delay=5.0, leave=False, mininterval=1.0)


class HfSampler:
    """Samples from the learner's module, which is in eval mode, so its weights are always current.

    Own loop instead of `generate`: finished responses leave the batch, and per-step overhead is lower (a third of the
    time at the embedded pair's size). model.generation_config is not used.
    """

    def __init__(
        self, model: PreTrainedModel, *, stop_ids: list[int], pad_id: int, batch_size: int, sharded: bool = False
    ) -> None:
        """`sharded`: FSDP holds the weights. It reuses its buffers in training, where inference tensors are refused."""
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size
        self.stop_ids = torch.tensor(stop_ids, device=model.device)
        self._without_gradients = torch.no_grad if sharded else torch.inference_mode

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int] | None = None,
        part: Part | None = None,
    ) -> list[Rollout]:
        """Rollouts, prompt-major. The same seed, prompts and weights give the same rollouts, up to rounding.

        A rollout's random numbers depend on its number in the whole batch, of which `prompts` may be a `part`;
        `indices` are not used.
        """
        positions, num_prompts = part or Part(range(len(prompts)), len(prompts))
        samples, total = sampling.samples, num_prompts * sampling.samples
        expanded = [prompt for prompt in prompts for _ in range(samples)]
        numbers = [i * samples + n for i in positions for n in range(samples)]
        rollouts: list[Rollout] = []
        with self._without_gradients(), progress_bar(total=len(expanded), desc="responses") as progress:
            for start in range(0, len(expanded), self.batch_size):
                batch = slice(start, start + self.batch_size)
                draws = Draws(seed, numbers[batch], total, self.batch_size, self.model.device)
                rollouts += self._generate_batch(expanded[batch], sampling, draws, progress)
                progress.update(len(rollouts) - progress.n)
        return rollouts

    def rest(self) -> None:
        pass  # a forward pass leaves nothing on the device

    def sync(self) -> None:
        pass  # the learner's module is sampled from

    def close(self) -> None:
        pass

    def _generate_batch(
        self, prompts: list[list[int]], sampling: Sampling, draws: Draws, progress: tqdm
    ) -> list[Rollout]:
        device, count, width, max_tokens = self.model.device, len(prompts), max(map(len, prompts)), sampling.max_tokens
        ids = torch.full((count, width), self.pad_id)
        mask = torch.ones(count, width + max_tokens, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padded on the left: new tokens follow the prompt
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, : width - len(prompt)] = 0
        ids, mask = ids.to(device), mask.to(device)
        position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)
        response_ids = torch.full((count, max_tokens), self.pad_id, device=device)
        logprobs = torch.zeros(count, max_tokens, device=device)
        # Rows that the model still runs on, and which of them have not stopped. `mask` and `position_ids` follow them.
        active, running = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
        cache: Cache | None = None
        cached_length, warpers, num_before = 0, _warpers(sampling), progress.n
        for step in range(max_tokens):
            length = width + step
            output = self.model(
                input_ids=ids,
                attention_mask=mask[:, :length],
                position_ids=position_ids[:, cached_length:length],
                use_cache=True,
                logits_to_keep=1,
                **{_CACHE: cache},
            )
            cache, cached_length, logits = output[_CACHE], length, output.logits[:, -1].float()
            # One uniform per rollout, finished or not, so that a response does not depend on when others finish.
            uniform = draws.next()[active]
            tokens = _draw(warpers(ids, logits), uniform) if sampling.temperature > 0 else logits.argmax(-1)
            response_ids[active, step] = tokens
            logprobs[active, step] = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            ids, running = tokens[:, None], running & ~torch.isin(tokens, self.stop_ids)
            num_running = int(running.sum())
            if num_running == 0:
                break
            if len(active) - num_running >= MIN_FINISHED_SHARE * len(active):
                progress.update(num_before + count - num_running - progress.n)
                assert cache is not None, "use_cache=True returns one"
                # Unlike batch_select_indices it also selects the states of recurrent layers.
                cache.reorder_cache(running.nonzero().squeeze(-1))  # pyright: ignore[reportArgumentType]
                active, ids, mask, position_ids = (rows[running] for rows in (active, ids, mask, position_ids))
                running = running[running]
        stops = torch.isin(response_ids, self.stop_ids)
        stopped = stops.any(1)
        lengths = torch.where(stopped, stops.int().argmax(1) + 1, max_tokens)
        rows = zip(prompts, response_ids.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        return [
            make_rollout(prompt, response[:length], values[:length], stopped=finished)
            for prompt, response, values, length, finished in rows
        ]


class CopySampler(HfSampler):
    """Samples from a plain copy of the learner's module: whole weights of the last `sync`, adapters merged.

    The learner may update its module at the same time. With several ranks each has a whole copy.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype,
        *,
        stop_ids: list[int],
        pad_id: int,
        batch_size: int,
    ) -> None:
        super().__init__(plain_copy(source, device, dtype), stop_ids=stop_ids, pad_id=pad_id, batch_size=batch_size)
        self.source = source
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the learner's weights; with sharded weights every rank takes part."""
        copies = dict(self.model.named_parameters())
        for name, tensor in merged_tensors(self.source):
            copies.pop(name).copy_(tensor)
        assert not copies, "both models have the same parameters"


class Draws:
    """A stream of uniform numbers for each rollout of a step, whichever rank and batch it is sampled in.

    The rollouts of all ranks, numbered prompt-major, are cut into batches of `batch_size`; each has a generator that
    draws a number for each of its rollouts at each token, on the host: the same numbers on any device.
    """

    def __init__(self, seed: int, numbers: list[int], total: int, batch_size: int, device: torch.device) -> None:
        """For the rollouts `numbers` of `total`."""
        batches = sorted({number // batch_size for number in numbers})
        self._counts = [min(batch_size, total - batch * batch_size) for batch in batches]
        self._generators = [torch.Generator().manual_seed(batch_seed(seed, batch)) for batch in batches]
        first = {batch: sum(self._counts[:i]) for i, batch in enumerate(batches)}
        rows = [first[number // batch_size] + number % batch_size for number in numbers]
        self._rows = None if rows == list(range(sum(self._counts))) else torch.tensor(rows)
        self._device = device

    def next(self) -> Float[Tensor, " n"]:
        """The next number of each rollout, float64 in [0, 1)."""
        pairs = zip(self._counts, self._generators, strict=True)
        drawn = torch.cat([torch.rand(count, dtype=torch.float64, generator=g) for count, g in pairs])
        return (drawn if self._rows is None else drawn[self._rows]).to(self._device)


def batch_seed(seed: int, batch: int) -> int:
    """`seed` for the first batch; torch's CPU generator takes 32 bits, so the others' are hashed to that size."""
    return seed if batch == 0 else int.from_bytes(blake2b(f"{seed}/{batch}".encode(), digest_size=4).digest(), "big")


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' warpers in its order, without those that change nothing."""
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: tokens (n,), each the first whose cumulative probability exceeds its `uniform` (n,).

    In float64, so that rounding does not distort the probabilities of a large vocabulary.
    """
    cumulative = logits.double().softmax(-1).cumsum_(-1)
    # Scale by the last sum, 1 up to rounding, so that no token of probability zero after it is drawn.
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return tokens.squeeze(-1)


def make_rollout(prompt: list[int], response: list[int], logprobs: list[float], *, stopped: bool) -> Rollout:
    """A prompt and its response, which includes the stop token if `stopped` and is truncated if not."""
    mask = [False] * len(prompt) + [True] * len(response)
    return Rollout(prompt + response, mask, "stop" if stopped else "length", logprobs)
