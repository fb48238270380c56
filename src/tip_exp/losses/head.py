"""The output head: hidden states to logits over the vocabulary that both models share, and gradients back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tip_exp.losses.embedding_grad import grad_of

# Rows of a 16-bit weight that are widened to float32 at once where the device has no mixed products; a part of a tile.
WIDENED_ROWS = 1024


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
        """Whole logits, differentiable, the product in the weight's own precision: what the model itself does."""
        weight, bias = self.weight, self.bias
        if len(weight) > self.vocab_size:  # the backward of a cut makes a second gradient of the whole weight
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        raw = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
        logits = raw.to(self.dtype) * self.scale if self.scale != 1.0 else raw.to(self.dtype)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits_into(self, tile: Float[Tensor, "n c"], hidden: Float[Tensor, "n d"], columns: slice) -> None:
        """Fill `tile` with the logits of some vocabulary columns: the product itself is accumulated in float32."""
        for part, at in self._pieces(columns):
            self._product(hidden, self.weight[part].T, tile[:, at])
        if self.bias is not None:
            tile += self.bias[columns]
        if self.scale != 1.0:
            tile *= self.scale
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope_(self, grad: Float[Tensor, "n c"], logits: Float[Tensor, "n c"]) -> None:
        """Turn a gradient at soft-capped logits, in place, into one before the cap; `logits` are overwritten."""
        assert self.softcap is not None, "without a soft cap the slope is one"
        grad.addcmul_(grad, logits.div_(self.softcap).square_(), value=-1)

    def backward(
        self,
        hidden: Float[Tensor, "n d"],
        logit_grad: Float[Tensor, "n c"],
        hidden_grad: Float[Tensor, "n d"],
        columns: slice,
    ) -> None:
        """Push a gradient at some columns, before the cap, back: adds to `hidden_grad` and into `weight.grad`.

        `hidden_grad` is of the head's dtype. A gradient of a 16-bit weight is rounded once a call.
        """
        if self.scale != 1.0:
            logit_grad.mul_(self.scale)
        if self.bias is not None and self.bias.requires_grad:
            grad_of(self.bias)[columns] += logit_grad.sum(0).to(self.bias.dtype)
        for part, at in self._pieces(columns):
            grad = logit_grad[:, at]
            self._product(grad, self.weight[part], hidden_grad, add=True)
            if self.weight.requires_grad:
                self._product(grad.T, hidden, grad_of(self.weight)[part], add=True)

    def _pieces(self, columns: slice) -> Iterator[tuple[slice, slice]]:
        """Cut columns so that a 16-bit weight is widened piece by piece: (rows of the weight, columns of the tile)."""
        width = columns.stop - columns.start
        widened = self.weight.dtype != self.dtype and not self._mixed
        step = WIDENED_ROWS if widened else max(1, width)
        for start in range(0, width, step):
            at = slice(start, min(start + step, width))
            yield slice(columns.start + at.start, columns.start + at.stop), at

    @property
    def _mixed(self) -> bool:
        """Whether the device multiplies 16-bit matrices with sums in float32."""
        return self.weight.is_cuda and self.weight.dtype != self.dtype

    def _product(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out (+)= a @ b, accumulated in the head's dtype whatever the operands are."""
        if self._mixed:
            a, b = a.to(self.weight.dtype), b.to(self.weight.dtype)
            product = torch.mm(a, b, out_dtype=self.dtype)
        else:
            a, b = a.to(self.dtype), b.to(self.dtype)
            if out.dtype == self.dtype:
                out.addmm_(a, b) if add else torch.mm(a, b, out=out)
                return
            product = a @ b
        out.add_(product) if add else out.copy_(product)
