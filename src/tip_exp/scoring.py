"""What every response token looks like to both models: full-vocabulary statistics, without gradient, tile by tile."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp import divergence
from tip_exp.heads import Head
from tip_exp.scores import STUDENT_STATISTICS

Statistics = dict[str, Tensor]  # name in scores.STATISTICS -> (N,)


@torch.no_grad()
def score_tokens(
    student_hidden: Float[Tensor, "n d"],
    teacher_hidden: Float[Tensor, "n e"],
    token_ids: Int[Tensor, " n"],
    student_head: Head,
    teacher_head: Head,
    *,
    wanted: frozenset[str],
    tile_bytes: int,
    jsd_beta: float = 0.5,
    top_k: int = 10,
) -> Statistics:
    """The `wanted` statistics of N response tokens (scores.STATISTICS; nats), in float32 or wider.

    `student_hidden` and `teacher_hidden` are the final hidden states that predict `token_ids`. Log-probs of full rows
    live only for one tile of rows; the teacher is projected only if a wanted statistic needs it.
    """
    tiles = []
    for rows in student_head.row_tiles(len(token_ids), tile_bytes):
        student = student_head.logprobs(student_hidden[rows])
        teacher = teacher_head.logprobs(teacher_hidden[rows]) if wanted - STUDENT_STATISTICS else None
        tiles.append(_of_tile(student, teacher, token_ids[rows], wanted, jsd_beta, top_k))
    if not tiles:
        return {name: torch.zeros(0, dtype=student_head.dtype, device=student_hidden.device) for name in wanted}
    return {name: torch.cat([tile[name] for tile in tiles]) for name in wanted}


@torch.no_grad()
def top_tokens(
    hidden: Float[Tensor, "n d"], head: Head, k: int, tile_bytes: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """A model's k likeliest next tokens at N positions, and their probabilities, tile by tile."""
    k = min(k, head.vocab_size)
    tiles = [head.logprobs(hidden[rows]).topk(k) for rows in head.row_tiles(len(hidden), tile_bytes)]
    if not tiles:
        nothing = torch.zeros(0, k, device=hidden.device)
        return nothing.long(), nothing
    return torch.cat([tile.indices for tile in tiles]), torch.cat([tile.values.exp() for tile in tiles])


def normalized_entropy(entropy: Tensor, vocab_size: int) -> Tensor:
    """H / ln V, in [0, 1]: TIP, Eq. 2."""
    return entropy / math.log(vocab_size)


def _of_tile(
    student: Tensor, teacher: Tensor | None, token_ids: Tensor, wanted: frozenset[str], jsd_beta: float, top_k: int
) -> Statistics:
    found: Statistics = {}
    if "entropy" in wanted:
        found["entropy"] = divergence.entropy(student)
    if "student_logprob" in wanted:
        found["student_logprob"] = student.gather(-1, token_ids[:, None]).squeeze(-1)
    if teacher is None:
        return found
    if "teacher_entropy" in wanted:
        found["teacher_entropy"] = divergence.entropy(teacher)
    if "teacher_logprob" in wanted:
        found["teacher_logprob"] = teacher.gather(-1, token_ids[:, None]).squeeze(-1)
    if "reverse_kl" in wanted:
        found["reverse_kl"] = divergence.reverse_kl(student, teacher).clamp_(min=0)  # rounding can go below
    if "forward_kl" in wanted:
        found["forward_kl"] = divergence.forward_kl(student, teacher).clamp_(min=0)
    if "jsd" in wanted:
        found["jsd"] = divergence.jsd(student, teacher, jsd_beta).clamp_(min=0)
    if "topk_overlap" in wanted:
        k = min(top_k, student.shape[-1])
        ours, theirs = student.topk(k).indices, teacher.topk(k).indices
        shared = (ours[:, :, None] == theirs[:, None, :]).any(-1)
        found["topk_overlap"] = shared.to(student.dtype).mean(-1)
    return found
