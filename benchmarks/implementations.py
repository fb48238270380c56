"""The gradient of a masked reverse KL with respect to hidden states and head, computed by each implementation.

Each takes a Case and returns the gradients of the divergence *summed* over the kept tokens. TRL and Liger are imported
only when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_exp.losses import fused, materialized
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.losses.token_stats import token_stats
from tip_exp.selector.scores import STATISTICS
from tip_exp.utils.units import MIB

REVERSE_KL = Divergence("reverse_kl")
EVERY_STATISTIC = frozenset(STATISTICS)
SOFT_OR_STATISTICS, GRAD_NORM = frozenset({"entropy", "reverse_kl"}), frozenset({"grad_norm"})
# (tokens, vocabulary) of TRL's tiles: its default, and the fastest of twelve measured on a CPU (results/LOG.md).
TRL_DEFAULT_TILE, TRL_BEST_TILE = (4096, 32768), (2048, 512)
SMALL_TILE_MIB, LARGE_TILE_MIB = 4, 128
FLOOR_TILE = (1024, 2048)  # (tokens, vocabulary): as fast as any measured


@dataclass(frozen=True, slots=True)
class Case:
    """Random hidden states and heads of both models (float32), and which of the n tokens are kept."""

    student_hidden: Tensor  # (n, d)
    teacher_hidden: Tensor  # (n, e)
    student_weight: Tensor  # (v, d), requires a gradient
    teacher_weight: Tensor  # (v, e)
    token_ids: Tensor  # (n,)
    kept_mask: Tensor  # (n,), bool
    tile_bytes: int

    @property
    def logits(self) -> tuple[LazyLogits, LazyLogits]:
        """Lazy logits of student and teacher."""
        vocab_size = len(self.student_weight)
        student, teacher = Head(self.student_weight, vocab_size), Head(self.teacher_weight, vocab_size)
        return LazyLogits(self.student_hidden, student), LazyLogits(self.teacher_hidden, teacher)

    @property
    def all_kept(self) -> bool:
        return bool(self.kept_mask.all())


@dataclass(frozen=True, slots=True)
class Gradients:
    hidden: Tensor  # (n, d), of the student's hidden states
    weight: Tensor  # (v, d), of the student's head


def make_case(tokens: int, vocab: int, student_width: int, teacher_width: int, tile_bytes: int, seed: int = 0) -> Case:
    """Both models' logits have standard deviation 1; every token is kept."""
    g = torch.Generator().manual_seed(seed)
    return Case(
        student_hidden=torch.randn(tokens, student_width, generator=g),
        teacher_hidden=torch.randn(tokens, teacher_width, generator=g),
        student_weight=torch.randn(vocab, student_width, generator=g).mul_(student_width**-0.5).requires_grad_(),
        teacher_weight=torch.randn(vocab, teacher_width, generator=g).mul_(teacher_width**-0.5),
        token_ids=torch.randint(vocab, (tokens,), generator=g),
        kept_mask=torch.ones(tokens, dtype=torch.bool),
        tile_bytes=tile_bytes,
    )


def random_mask(tokens: int, retention: float) -> Tensor:
    """True on max(1, floor(retention x tokens)) random tokens, (tokens,)."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[order[: max(1, int(retention * tokens))]] = True
    return mask


def exact_gradients(case: Case, rows_per_chunk: int = 64) -> Gradients:
    """In float64 by autograd on whole rows of logits, some rows at a time."""
    student_weight, teacher_weight = (
        case.student_weight.detach().double().requires_grad_(),
        case.teacher_weight.double(),
    )
    hidden_grad = torch.zeros_like(case.student_hidden, dtype=torch.float64)
    for rows in case.kept_mask.nonzero().squeeze(-1).split(rows_per_chunk):
        hidden = case.student_hidden[rows].double().requires_grad_()
        student_logprobs = (hidden @ student_weight.T).log_softmax(-1)
        teacher_logprobs = (case.teacher_hidden[rows].double() @ teacher_weight.T).log_softmax(-1)
        (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum().backward()
        assert hidden.grad is not None
        hidden_grad[rows] = hidden.grad
    assert student_weight.grad is not None
    return Gradients(hidden_grad, student_weight.grad)


def relative_error(computed: Gradients, exact: Gradients) -> float:
    """|computed - exact| / |exact| in the Frobenius norm: the larger of the errors of hidden states and head."""
    pairs = ((computed.hidden, exact.hidden), (computed.weight, exact.weight))
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _fused_after_stats(case: Case, statistics: frozenset[str]) -> Gradients:
    """The fused loss, after a pass that measures these statistics; without any, there is no such pass."""
    student, teacher = case.logits
    log_normalizers = None
    if statistics:
        stats = token_stats(student, teacher, case.token_ids, wanted=statistics, tile_bytes=case.tile_bytes)
        log_normalizers = stats.log_normalizers
    result = fused(student, teacher, case.kept_mask, REVERSE_KL, case.tile_bytes, log_normalizers=log_normalizers)
    return _with_weight_grad(case, result.hidden_grad)


def _stats_alone(case: Case, statistics: frozenset[str]) -> Gradients:
    """The pass that measures these statistics of every token; the result is no gradient."""
    token_stats(*case.logits, case.token_ids, wanted=statistics, tile_bytes=case.tile_bytes)
    return Gradients(case.student_hidden, case.student_weight)


def _fused(case: Case) -> Gradients:
    """Measures every statistic if tokens are selected; needs none if all are kept."""
    return _fused_after_stats(case, frozenset() if case.all_kept else EVERY_STATISTIC)


def _materialized(case: Case) -> Gradients:
    result = materialized(*case.logits, case.kept_mask, REVERSE_KL, case.tile_bytes)
    return _with_weight_grad(case, result.hidden_grad)


def _naive(case: Case) -> Gradients:
    """PyTorch's own functions on all logits of both models; the mask multiplies the values."""
    hidden = case.student_hidden.clone().requires_grad_()
    student_logprobs = torch.log_softmax(hidden @ case.student_weight.T, -1)
    teacher_logprobs = torch.log_softmax(case.teacher_hidden @ case.teacher_weight.T, -1)
    kl_div = torch.nn.functional.kl_div
    per_token = kl_div(teacher_logprobs, student_logprobs, reduction="none", log_target=True).sum(-1)
    (per_token * case.kept_mask).sum().backward()
    return _by_autograd(case, hidden)


def _floor(case: Case) -> Gradients:
    """The GEMMs alone, a lower bound on time; the result is no gradient.

    Both models' logits and both gradient products for the kept tokens, and first the logits of all if any is dropped.
    """
    student_weight, teacher_weight = case.student_weight.detach(), case.teacher_weight
    hidden_grad, weight_grad = torch.zeros_like(case.student_hidden), torch.zeros_like(student_weight)
    passes = [(case.student_hidden[case.kept_mask], case.teacher_hidden[case.kept_mask], True)]
    if not case.all_kept:
        passes.insert(0, (case.student_hidden, case.teacher_hidden, False))
    tile = student_weight.new_empty(FLOOR_TILE[0] * FLOOR_TILE[1])
    for student_hidden, teacher_hidden, backward in passes:
        chunks = (tensor.split(FLOOR_TILE[0]) for tensor in (student_hidden, teacher_hidden, hidden_grad))
        for student_rows, teacher_rows, grad_rows in zip(*chunks, strict=False):
            for start in range(0, len(student_weight), FLOOR_TILE[1]):
                columns = slice(start, min(start + FLOOR_TILE[1], len(student_weight)))
                logits = tile[: len(student_rows) * (columns.stop - start)].view(len(student_rows), -1)
                torch.mm(teacher_rows, teacher_weight[columns].T, out=logits)
                torch.mm(student_rows, student_weight[columns].T, out=logits)
                if backward:
                    grad_rows[: len(student_rows)].addmm_(logits, student_weight[columns])
                    weight_grad[columns].addmm_(logits.T, student_rows)
    return Gradients(hidden_grad, weight_grad)


def trl_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tile: tuple[int, int],
) -> Tensor:
    """TRL 1.16's differentiable reverse KL per token, (n,). Its tile size is two constants of its module."""
    from trl.kernels import chunked_divergence as kernel  # pyright: ignore[reportMissingImports]

    kernel.TOKEN_CHUNK_SIZE, kernel.VOCAB_CHUNK_SIZE = tile
    function = kernel.ChunkedDivergenceFunction.apply
    return function(student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, 1.0)[0]


def _trl(case: Case, tile: tuple[int, int]) -> Gradients:
    """As TRL's trainer on a CPU: logits of every token are computed, then the mask applies."""
    hidden = case.student_hidden.clone().requires_grad_()
    per_token = trl_divergence(hidden, case.student_weight, case.teacher_hidden, case.teacher_weight, tile)
    (per_token * case.kept_mask).sum().backward()
    return _by_autograd(case, hidden)


def _trl_kept_alone(case: Case) -> Gradients:
    """A selector in front of TRL's function: one pass without gradient for the scores, then the kept rows alone."""
    weights = case.student_weight, case.teacher_weight
    with torch.no_grad():
        trl_divergence(case.student_hidden, weights[0], case.teacher_hidden, weights[1], TRL_BEST_TILE)
    hidden = case.student_hidden.clone().requires_grad_()
    kept_hidden, kept_teacher_hidden = hidden[case.kept_mask], case.teacher_hidden[case.kept_mask]
    trl_divergence(kept_hidden, weights[0], kept_teacher_hidden, weights[1], TRL_BEST_TILE).sum().backward()
    return _by_autograd(case, hidden)


def _liger(case: Case) -> Gradients:
    """Liger's fused linear JSD at beta = 1, which is KL(student || teacher); default chunk size, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    hidden = case.student_hidden.clone().requires_grad_()
    target = torch.where(case.kept_mask, 0, -100)
    mean = loss(hidden, case.student_weight, case.teacher_hidden, case.teacher_weight, target)
    (mean * case.kept_mask.sum()).backward()
    return _by_autograd(case, hidden)


def _by_autograd(case: Case, hidden: Tensor) -> Gradients:
    assert hidden.grad is not None, "backward() has run"
    return _with_weight_grad(case, hidden.grad)


def _with_weight_grad(case: Case, hidden_grad: Tensor) -> Gradients:
    assert case.student_weight.grad is not None, "every implementation accumulates the head's gradient"
    return Gradients(hidden_grad, case.student_weight.grad)


IMPLEMENTATIONS: dict[str, Callable[[Case], Gradients]] = {
    "floor": _floor,
    "fused": _fused,
    "fused_small": lambda case: _fused(replace(case, tile_bytes=SMALL_TILE_MIB * MIB)),
    "fused_large": lambda case: _fused(replace(case, tile_bytes=LARGE_TILE_MIB * MIB)),
    "fused_scored": lambda case: _fused_after_stats(case, EVERY_STATISTIC),
    "fused_soft_or": lambda case: _fused_after_stats(case, SOFT_OR_STATISTICS),
    "fused_grad_norm": lambda case: _fused_after_stats(case, GRAD_NORM),
    "stats_soft_or": lambda case: _stats_alone(case, SOFT_OR_STATISTICS),
    "stats_grad_norm": lambda case: _stats_alone(case, GRAD_NORM),
    "materialized": _materialized,
    "trl": lambda case: _trl(case, TRL_DEFAULT_TILE),
    "trl_best": lambda case: _trl(case, TRL_BEST_TILE),
    "trl_kept_alone": _trl_kept_alone,
    "liger": _liger,
    "naive": _naive,
}
NO_GRADIENT = frozenset({"floor", "stats_soft_or", "stats_grad_norm"})
# The library that an implementation imports.
REQUIRES = {"trl": "trl", "trl_best": "trl", "trl_kept_alone": "trl", "liger": "liger_kernel"}
