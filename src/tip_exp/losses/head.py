"""The output head: hidden states to logits over the vocabulary that both models share, and gradients back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tip_exp.losses.embedding_grad import grad_buffer
from tip_exp.losses.stop_class import LOWEST, merge_tile_, merged, take_class_gradient_
from tip_exp.losses.tiling import Workspace

# Rows of a 16-bit weight converted to float32 at a time where the device has no mixed-precision GEMM.
CONVERTED_ROWS = 1024
# Rows of a weight per GEMM of logits on a CPU: with tiles of few rows, wider GEMMs take up to 1.4 times as long.
LOGIT_ROWS = 1024
# Rows of a weight per pair of GEMMs for gradients. On CUDA the gradient of a 16-bit weight is first a float32 product:
# 128 MiB at hidden size 4096.
PRODUCT_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap(scale * (hidden @ weight[:vocab_size].T + bias)), in float32 or wider.

    `weight` is the model's own parameter, possibly tied to its embedding; `vocab_size` limits it to the shared ids.
    Cohere and Granite scale their logits, Gemma 2 soft-caps them: softcap(x) = c tanh(x / c). A bias of -inf excludes a
    token from the vocabulary. The ids of `stop_class` count as one token, the first of them (losses/stop_class.py).
    """

    weight: Tensor  # (V, D)
    vocab_size: int
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    stop_class: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.stop_class and self.softcap is not None:
            raise ValueError("a soft-capped output head cannot count several stop ids as one token")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits and of everything computed from them."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """All logits, differentiable, as precise as `logits_into`; for a gradient a 16-bit weight is copied to float32.

        A model's own forward pass rounds the logits of a 16-bit head to 16 bits.
        """
        if self.weight.dtype != self.dtype and not torch.is_grad_enabled():
            logits = torch.empty(len(hidden), self.vocab_size, dtype=self.dtype, device=hidden.device)
            self.logits_into(logits, hidden, slice(0, self.vocab_size))
            return logits
        weight, bias = self.weight, self.bias
        if len(weight) > self.vocab_size:  # only if needed: the backward of a slice allocates a full-size gradient
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        bias = None if bias is None else self._finite(bias)
        raw = torch.nn.functional.linear(hidden.to(self.dtype), weight.to(self.dtype), bias)
        logits = raw * self.scale if self.scale != 1.0 else raw
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return merged(logits, self.stop_class) if self.stop_class else logits

    def logits_into(self, tile: Float[Tensor, "n c"], hidden: Float[Tensor, "n d"], columns: slice) -> None:
        """Fill `tile` with the logits of some vocabulary columns; the GEMM accumulates in float32."""
        for weight_rows, tile_columns in self._pieces(columns, None if tile.is_cuda else LOGIT_ROWS):
            self._matmul(hidden, self.weight[weight_rows].T, tile[:, tile_columns])
        if self.bias is not None:
            tile += self._finite(self.bias[columns])
        if self.scale != 1.0:
            tile *= self.scale
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.stop_class:
            merge_tile_(tile, columns, self.stop_class, lambda: self._of_class().logits(hidden))

    @property
    def grad_dtype(self) -> torch.dtype:
        """Dtype of a `logit_grad` that `backward` need not cast: 16 bits for 16-bit GEMMs without scale and bias."""
        return self.weight.dtype if self._has_mixed_gemm and self.scale == 1.0 and self.bias is None else self.dtype

    def softcap_backward_(self, grad: Float[Tensor, "n c"], logits: Float[Tensor, "n c"]) -> None:
        """Multiply a gradient at soft-capped logits by d softcap / dx = 1 - (logits / c)^2; overwrites `logits`."""
        assert self.softcap is not None, "without a soft cap the slope is one"
        grad.addcmul_(grad, logits.div_(self.softcap).square_(), value=-1)

    def backward(
        self,
        hidden: Float[Tensor, "n d"],
        logit_grad: Float[Tensor, "n c"],
        hidden_grad: Float[Tensor, "n d"],
        columns: slice,
    ) -> None:
        """Add the gradient at some columns (before the cap) to `hidden_grad` and to `weight.grad` and `bias.grad`.

        `logit_grad` has the dtype `dtype` or `grad_dtype`, `hidden_grad` the dtype `dtype`. The gradient of a 16-bit
        weight is rounded once per call. `logit_grad` is overwritten.
        """
        if self.stop_class:
            self._backward_of_class(hidden, logit_grad, hidden_grad, columns)
        if self.scale != 1.0:
            logit_grad.mul_(self.scale)
        if self.bias is not None and self.bias.requires_grad:
            grad_buffer(self.bias)[columns] += logit_grad.sum(0).to(self.bias.dtype)
        for weight_rows, tile_columns in self._pieces(columns, PRODUCT_ROWS):
            grad = logit_grad[:, tile_columns]
            if self._has_mixed_gemm:
                grad = grad.to(self.weight.dtype)  # once for both GEMMs
            self._matmul(grad, self.weight[weight_rows], hidden_grad, add=True)
            if self.weight.requires_grad:
                self._matmul(grad.T, hidden, grad_buffer(self.weight)[weight_rows], add=True)

    def _of_class(self) -> Head:
        """A head of the class's ids alone, each a token."""
        ids, bias = list(self.stop_class), self.bias
        weight = self.weight.detach()[ids].requires_grad_(self.weight.requires_grad)
        bias = None if bias is None else bias.detach()[ids].requires_grad_(bias.requires_grad)
        return replace(self, weight=weight, vocab_size=len(ids), bias=bias, stop_class=())

    def _backward_of_class(self, hidden: Tensor, logit_grad: Tensor, hidden_grad: Tensor, columns: slice) -> None:
        """`backward` for the columns of the class, which become zero in `logit_grad`."""
        class_grad = take_class_gradient_(logit_grad, columns, self.stop_class)
        if class_grad is None:
            return
        head = self._of_class()
        head.backward(
            hidden, class_grad[:, None] * head.logits(hidden).softmax(-1), hidden_grad, slice(0, head.vocab_size)
        )
        for parameter, of_class in ((self.weight, head.weight), (self.bias, head.bias)):
            if parameter is not None and of_class is not None and of_class.grad is not None:
                grad_buffer(parameter)[list(self.stop_class)] += of_class.grad

    @property
    def excluded(self) -> Bool[Tensor, " v"]:
        """The tokens whose logit is -inf."""
        if self.bias is None or self.softcap is not None:  # softcap(-inf) = -c
            return torch.zeros(self.vocab_size, dtype=torch.bool, device=self.weight.device)
        return self.bias[: self.vocab_size].isneginf()

    def _finite(self, bias: Tensor) -> Tensor:
        return bias.to(self.dtype).clamp(min=LOWEST)

    def _pieces(self, columns: slice, gemm_rows: int | None) -> Iterator[tuple[slice, slice]]:
        """(rows of the weight, columns of the tile) of each GEMM: at most `gemm_rows`, fewer if they are converted."""
        width = columns.stop - columns.start
        converts = self.weight.dtype != self.dtype and not self._has_mixed_gemm
        step = CONVERTED_ROWS if converts else gemm_rows or max(1, width)
        for start in range(0, width, step):
            tile_columns = slice(start, min(start + step, width))
            yield slice(columns.start + tile_columns.start, columns.start + tile_columns.stop), tile_columns

    @property
    def _has_mixed_gemm(self) -> bool:
        """Whether the weight is 16-bit on a device whose GEMM takes 16-bit inputs and returns float32."""
        return self.weight.is_cuda and self.weight.dtype != self.dtype

    def _matmul(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out (+)= a @ b, accumulated in the head's dtype whatever the operands' dtypes."""
        if self._has_mixed_gemm:
            a, b = a.to(self.weight.dtype), b.to(self.weight.dtype)
            if out.dtype == a.dtype and add:
                out.addmm_(a, b)  # the GEMM adds in float32 and rounds the sum
            elif not add:
                torch.mm(a, b, out_dtype=self.dtype, out=out)
            else:
                out.add_(torch.mm(a, b, out_dtype=self.dtype))
            return
        a, b = a.to(self.dtype), b.to(self.dtype)
        if out.dtype == self.dtype:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        else:
            out.add_(a @ b)


@dataclass(frozen=True, slots=True)
class LazyLogits:
    """One model's logits at N response tokens, not yet computed: `hidden` (N, D) predicts them through `head`."""

    hidden: Float[Tensor, "n d"]
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Tensor | slice) -> LazyLogits:
        return LazyLogits(self.hidden[rows], self.head)


def check_same_tokens(student: Head, teacher: Head) -> None:
    """Raise ValueError if one model excludes a token that the other does not: one of their KLs is infinite."""
    if student.bias is None and teacher.bias is None:
        return
    different = (student.excluded != teacher.excluded).nonzero()
    if len(different):
        token = int(different[0])
        roles = ("student", "teacher") if bool(student.excluded[token]) else ("teacher", "student")
        raise ValueError(
            f"the logit is -inf at token {token} for the {roles[0]} but not for the {roles[1]}, and {len(different)} "
            "tokens differ in this way: a KL of the two is infinite. Give both output heads the same biases of -inf"
        )


def project(models: Sequence[LazyLogits], columns: slice, workspace: Workspace) -> list[Float[Tensor, "n c"]]:
    """Each model's logits of some vocabulary columns, in its tile of the workspace."""
    tiles = workspace.tiles(len(models[0]), columns)
    for model, tile in zip(models, tiles, strict=True):
        model.head.logits_into(tile, model.hidden, columns)
    return tiles
