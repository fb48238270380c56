"""Statistics of the tokens that each model finds most likely, from whole rows of logits (n, V)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp.losses.tiling import GROUP, Workspace

TOP_TOKEN_STATISTICS = frozenset({"topk_overlap", "teacher_mass_topk", "teacher_rank", "ier"})
SUPPORT = 16  # K of teacher_mass_topk (TA-OPD) and of IER
_MAX_LOG_RATIO = 30.0  # IER, code
_MIN_NOISE = 1e-8  # IER, code


def top_token_statistics(
    student_logits: Float[Tensor, "n v"],
    teacher_logits: Float[Tensor, "n v"],
    teacher_log_normalizer: Float[Tensor, " n"],
    token_ids: Int[Tensor, " n"],
    group_maxima: Tensor,
    workspace: Workspace,
    *,
    overlap_k: int,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Each wanted name of TOP_TOKEN_STATISTICS -> (n,), float64; `group_maxima` (2, n, V // GROUP): see add_tile."""
    vocab_size = student_logits.shape[1]
    overlap_k, support = min(overlap_k, vocab_size), min(SUPPORT, vocab_size)
    k = overlap_k if wanted <= {"topk_overlap"} else max(overlap_k, support)
    student_top, teacher_top = (
        top_ids(logits, maxima, k)
        for logits, maxima in zip((student_logits, teacher_logits), group_maxima, strict=True)
    )
    values: dict[str, Tensor] = {}
    if "topk_overlap" in wanted:
        same = student_top[:, :overlap_k, None] == teacher_top[:, None, :overlap_k]
        values["topk_overlap"] = same.any(-1).double().mean(-1)
    student_top, teacher_top = student_top[:, :support], teacher_top[:, :support]
    if "teacher_mass_topk" in wanted:
        logprobs = teacher_logits.gather(-1, student_top).double() - teacher_log_normalizer[:, None]
        values["teacher_mass_topk"] = logprobs.exp().sum(-1).clamp(max=1)
    if "teacher_rank" in wanted:
        likeliest = teacher_logits.gather(-1, student_top[:, :1])
        values["teacher_rank"] = _count_above(teacher_logits, likeliest, workspace)
    if "ier" in wanted:
        candidates = torch.cat([student_top, teacher_top, token_ids[:, None]], -1).sort(-1).values
        logits = (student_logits.gather(-1, candidates), teacher_logits.gather(-1, candidates))
        values["ier"] = _ier(*logits, candidates)
    return values


def _ier(student_logits: Tensor, teacher_logits: Tensor, candidates: Int[Tensor, "n c"]) -> Tensor:
    """Signal over noise of the sampled reverse-KL gradient on the candidates, whose ids are sorted: (n,) float64.

    IER (2609.24432): r = log p / q with p and q renormalized on the candidates, signal = Var_p[r], L = 1/p - 1,
    b = E_p[r L] / E_p[L], noise = E_p[(r - b)^2 L] - signal.
    """
    repeated = torch.zeros_like(candidates, dtype=torch.bool)
    repeated[:, 1:] = candidates[:, 1:] == candidates[:, :-1]
    logp, logq = (
        x.double().masked_fill(repeated, -torch.inf).log_softmax(-1) for x in (student_logits, teacher_logits)
    )
    p = logp.exp()
    r = (logp - logq).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).masked_fill(repeated, 0)
    p_times_l = (1 - p).masked_fill(repeated, 0)
    signal = (p * (r - (p * r).sum(-1, keepdim=True)) ** 2).sum(-1)
    b = (p_times_l * r).sum(-1, keepdim=True) / p_times_l.sum(-1, keepdim=True).clamp(min=_MIN_NOISE)
    noise = (p_times_l * (r - b) ** 2).sum(-1) - signal
    return signal / noise.clamp(min=_MIN_NOISE)


def _count_above(logits: Tensor, threshold: Float[Tensor, "n 1"], workspace: Workspace) -> Float[Tensor, " n"]:
    """Number of each row's logits above a threshold. On a CPU by way of floats: counting booleans takes longer."""
    if logits.is_cuda:
        return (logits > threshold).sum(-1).double()
    counts = torch.empty(len(logits), dtype=torch.float64)
    for rows in workspace.blocks(logits):
        above = torch.gt(logits[rows], threshold[rows], out=workspace.scratch(0, logits[rows]))
        counts[rows] = above.sum(-1).double()
    return counts


def top_ids(logits: Tensor, group_maxima: Tensor, k: int) -> Tensor:
    """Token ids of each row's k largest logits, (n, k), the largest first.

    They lie in the k groups with the largest maxima (or the columns after the last full group), so only those are read.
    """
    num_groups, device = group_maxima.shape[1], logits.device
    top_groups = group_maxima.topk(min(k, num_groups)).indices
    grouped_ids = top_groups[:, :, None] * GROUP + torch.arange(GROUP, device=device)
    ungrouped_ids = torch.arange(num_groups * GROUP, logits.shape[1], device=device).expand(len(logits), -1)
    candidates = torch.cat([grouped_ids.flatten(1), ungrouped_ids], -1)
    return candidates.gather(-1, logits.gather(-1, candidates).topk(k).indices)
