"""The output head: hidden states to logits over the vocabulary that both models share, a tile of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Tiles alive at once in the worst case: both models' log-probs, the student's probabilities, two of the divergence.
TILES_ALIVE = 5


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap(scale * (hidden @ weight[:vocab_size].T + bias)), in float32 or wider.

    `scale` and `softcap` are what Cohere, Granite and Gemma 2 do after their last matrix product. `weight` is
    the model's own parameter, perhaps tied to its embedding; `vocab_size` cuts it to the ids that both models know.
    """

    weight: Tensor  # (V, D)
    vocab_size: int
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits and of everything computed from them."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        raw = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight[: self.vocab_size], bias)
        logits = raw.to(self.dtype) * self.scale if self.scale != 1.0 else raw.to(self.dtype)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logprobs(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        return self.logits(hidden).log_softmax(-1)

    def backward(
        self, hidden: Float[Tensor, "n d"], logit_grad: Float[Tensor, "n v"], logits: Float[Tensor, "n v"] | None
    ) -> Float[Tensor, "n d"]:
        """Push a gradient through the head: returns the hidden states', adds the weight's into `weight.grad` in place.

        `logits` is needed only for a soft-capped head, whose slope depends on them.
        """
        grad = logit_grad
        if self.softcap is not None:
            assert logits is not None, "a soft-capped head needs its logits"
            grad = grad * (1 - (logits / self.softcap).square())
        if self.scale != 1.0:
            grad = grad * self.scale
        if self.bias is not None and self.bias.requires_grad:
            _grad_of(self.bias)[: self.vocab_size] += grad.sum(0).to(self.bias.dtype)
        grad = grad.to(self.weight.dtype)
        if self.weight.requires_grad:
            _grad_of(self.weight)[: self.vocab_size].addmm_(grad.T, hidden.to(self.weight.dtype))
        return (grad @ self.weight[: self.vocab_size]).to(hidden.dtype)

    def row_tiles(self, num_rows: int, tile_bytes: int) -> Iterator[slice]:
        """Slices of rows whose vocabulary-sized temporaries together stay within `tile_bytes` (at least one row)."""
        rows = max(1, tile_bytes // (TILES_ALIVE * self.vocab_size * self.dtype.itemsize))
        for start in range(0, num_rows, rows):
            yield slice(start, min(start + rows, num_rows))


def _grad_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
