"""One masked reverse-KL update of hidden states and head, by every implementation: ours, the peers', the limit.

Each takes a Case and returns the gradients of the divergence *summed* over the kept tokens. Peers are imported when
they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_exp.losses.divergence import Divergence
from tip_exp.losses.fused import fused
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.losses.materialized import materialized
from tip_exp.losses.token_stats import token_stats
from tip_exp.selector.scores import STATISTICS
from tip_exp.utils.units import MIB

REVERSE_KL = Divergence("reverse_kl")
# What Soft-OR reads; normalisers come with it.
READ_BY_SOFT_OR = frozenset({"entropy", "reverse_kl"})
# (tokens, vocabulary) of TRL's tiles: what it ships, and the fastest of a dozen measured on a CPU (results/LOG.md).
TRL_DEFAULT_TILE, TRL_BEST_TILE = (4096, 32768), (2048, 512)
SMALL_TILE_MIB, LARGE_TILE_MIB = 4, 128
FLOOR_TILE = (1024, 2048)  # rows and columns: as fast as any measured


@dataclass(frozen=True, slots=True)
class Case:
    """Random hidden states and heads of both models (float32), and which of the N tokens are kept."""

    hidden: Tensor  # (N, D)
    other: Tensor  # (N, E), the teacher's
    weight: Tensor  # (V, D), requires a gradient
    other_weight: Tensor  # (V, E)
    token_ids: Tensor  # (N,)
    kept: Tensor  # (N,), bool
    tile_bytes: int

    @property
    def logits(self) -> tuple[LazyLogits, LazyLogits]:
        """Of student and teacher."""
        head, teacher_head = Head(self.weight, len(self.weight)), Head(self.other_weight, len(self.other_weight))
        return LazyLogits(self.hidden, head), LazyLogits(self.other, teacher_head)

    @property
    def all_kept(self) -> bool:
        return bool(self.kept.all())


@dataclass(frozen=True, slots=True)
class Gradients:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)


def make_case(tokens: int, vocab: int, hidden: int, teacher_hidden: int, tile_bytes: int, seed: int = 0) -> Case:
    """Logits of standard deviation 1 in both models; every token is kept."""
    g = torch.Generator().manual_seed(seed)
    return Case(
        hidden=torch.randn(tokens, hidden, generator=g),
        other=torch.randn(tokens, teacher_hidden, generator=g),
        weight=torch.randn(vocab, hidden, generator=g).mul_(hidden**-0.5).requires_grad_(),
        other_weight=torch.randn(vocab, teacher_hidden, generator=g).mul_(teacher_hidden**-0.5),
        token_ids=torch.randint(vocab, (tokens,), generator=g),
        kept=torch.ones(tokens, dtype=torch.bool),
        tile_bytes=tile_bytes,
    )


def keep(tokens: int, retention: float) -> Tensor:
    """A random mask of retention x tokens, rounded down but never empty."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[order[: max(1, int(retention * tokens))]] = True
    return mask


def exact(case: Case, rows_at_once: int = 64) -> Gradients:
    """In float64, by autograd through whole rows of logits, some rows at a time."""
    weight, other_weight = case.weight.detach().double().requires_grad_(), case.other_weight.double()
    gradient = torch.zeros_like(case.hidden, dtype=torch.float64)
    for rows in case.kept.nonzero().squeeze(-1).split(rows_at_once):
        hidden = case.hidden[rows].double().requires_grad_()
        logp = (hidden @ weight.T).log_softmax(-1)
        logq = (case.other[rows].double() @ other_weight.T).log_softmax(-1)
        (logp.exp() * (logp - logq)).sum().backward()
        assert hidden.grad is not None
        gradient[rows] = hidden.grad
    assert weight.grad is not None
    return Gradients(gradient, weight.grad)


def relative_error(found: Gradients, truth: Gradients) -> float:
    """|found - truth| / |truth|, Frobenius, the larger of hidden states' and head's."""
    pairs = ((found.hidden, truth.hidden), (found.weight, truth.weight))
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _ours(case: Case, wanted: frozenset[str]) -> Gradients:
    student, teacher = case.logits
    log_normalizers = None
    if wanted:
        stats = token_stats(student, teacher, case.token_ids, wanted=wanted, tile_bytes=case.tile_bytes)
        log_normalizers = stats.log_normalizers
    result = fused(student, teacher, case.kept, REVERSE_KL, case.tile_bytes, log_normalizers=log_normalizers)
    return _with_head(case, result.hidden_grad)


def _fused(case: Case) -> Gradients:
    """With scoring of every statistic where something is selected; where all is kept no score is needed."""
    return _ours(case, frozenset() if case.all_kept else frozenset(STATISTICS))


def _fused_small(case: Case) -> Gradients:
    """In tiles of SMALL_TILE_MIB, for those who want memory rather than time."""
    return _fused(replace(case, tile_bytes=SMALL_TILE_MIB * MIB))


def _fused_large(case: Case) -> Gradients:
    """In tiles of LARGE_TILE_MIB: of a vocabulary of 152k the usual ones hold few whole rows."""
    return _fused(replace(case, tile_bytes=LARGE_TILE_MIB * MIB))


def _fused_scored(case: Case) -> Gradients:
    return _ours(case, frozenset(STATISTICS))


def _fused_soft_or(case: Case) -> Gradients:
    return _ours(case, READ_BY_SOFT_OR)


def _materialized(case: Case) -> Gradients:
    result = materialized(*case.logits, case.kept, REVERSE_KL, case.tile_bytes)
    return _with_head(case, result.hidden_grad)


def _naive(case: Case) -> Gradients:
    """Whole logits of both models by PyTorch's own functions; the mask multiplies."""
    hidden = case.hidden.clone().requires_grad_()
    logp = torch.log_softmax(hidden @ case.weight.T, -1)
    logq = torch.log_softmax(case.other @ case.other_weight.T, -1)
    per_token = torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    (per_token * case.kept).sum().backward()
    return _by_autograd(case, hidden)


def _floor(case: Case) -> Gradients:
    """Products alone: both logits of all tokens where something is selected, and four of the kept ones. No gradient."""
    weight, other_weight = case.weight.detach(), case.other_weight
    hidden_grad, weight_grad = torch.zeros_like(case.hidden), torch.zeros_like(weight)
    passes = [(case.hidden[case.kept], case.other[case.kept], True)]
    if not case.all_kept:
        passes.insert(0, (case.hidden, case.other, False))
    tile = torch.empty(FLOOR_TILE[0] * FLOOR_TILE[1])
    for hidden, other, backward in passes:
        for h, o, g in zip(*(one.split(FLOOR_TILE[0]) for one in (hidden, other, hidden_grad)), strict=False):
            for start in range(0, len(weight), FLOOR_TILE[1]):
                part = slice(start, min(start + FLOOR_TILE[1], len(weight)))
                logits = tile[: len(h) * (part.stop - start)].view(len(h), -1)
                torch.mm(o, other_weight[part].T, out=logits)
                torch.mm(h, weight[part].T, out=logits)
                if backward:
                    g[: len(h)].addmm_(logits, weight[part])
                    weight_grad[part].addmm_(logits.T, h)
    return Gradients(hidden_grad, weight_grad)


def trl_divergence(
    hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, tile: tuple[int, int]
) -> Tensor:
    """TRL 1.16's differentiable reverse KL per token. Its tiles are constants of a module, read in both directions."""
    from trl.kernels import chunked_divergence as kernel  # pyright: ignore[reportMissingImports]

    kernel.TOKEN_CHUNK_SIZE, kernel.VOCAB_CHUNK_SIZE = tile
    return kernel.ChunkedDivergenceFunction.apply(hidden, weight, None, other, other_weight, None, 1.0)[0]


def _trl(case: Case, tile: tuple[int, int]) -> Gradients:
    """As TRL's trainer on a CPU: every token is projected, the mask comes after."""
    hidden = case.hidden.clone().requires_grad_()
    (trl_divergence(hidden, case.weight, case.other, case.other_weight, tile) * case.kept).sum().backward()
    return _by_autograd(case, hidden)


def _trl_kept_alone(case: Case) -> Gradients:
    """As a selection with TRL's function could be: a pass without gradient for the scores, then kept rows alone."""
    with torch.no_grad():
        trl_divergence(case.hidden, case.weight, case.other, case.other_weight, TRL_BEST_TILE)
    hidden, other = case.hidden.clone().requires_grad_(), case.other[case.kept]
    trl_divergence(hidden[case.kept], case.weight, other, case.other_weight, TRL_BEST_TILE).sum().backward()
    return _by_autograd(case, hidden)


def _liger(case: Case) -> Gradients:
    """Liger's fused linear JSD at beta = 1, which is KL(student || teacher); in its default chunks, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    hidden = case.hidden.clone().requires_grad_()
    target = torch.where(case.kept, 0, -100)
    mean = loss(hidden, case.weight, case.other, case.other_weight, target)
    (mean * case.kept.sum()).backward()
    return _by_autograd(case, hidden)


def _with_head(case: Case, hidden_grad: Tensor) -> Gradients:
    assert case.weight.grad is not None, "the head takes part in the loss"
    return Gradients(hidden_grad, case.weight.grad)


def _by_autograd(case: Case, hidden: Tensor) -> Gradients:
    assert hidden.grad is not None, "the hidden states take part in the loss"
    return _with_head(case, hidden.grad)


IMPLEMENTATIONS: dict[str, Callable[[Case], Gradients]] = {
    "floor": _floor,
    "fused": _fused,
    "fused_small": _fused_small,
    "fused_large": _fused_large,
    "fused_scored": _fused_scored,
    "fused_soft_or": _fused_soft_or,
    "materialized": _materialized,
    "trl": lambda case: _trl(case, TRL_DEFAULT_TILE),
    "trl_best": lambda case: _trl(case, TRL_BEST_TILE),
    "trl_kept_alone": _trl_kept_alone,
    "liger": _liger,
    "naive": _naive,
}
# Library of a peer's implementations.
NEEDS = {"trl": "trl", "trl_best": "trl", "trl_kept_alone": "trl", "liger": "liger_kernel"}
