"""Full-vocabulary statistics of every response token under both models, in one pass without gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp.losses.head import Head, LazyLogits, check_same_tokens, project
from tip_exp.losses.online_softmax import LogNormalizers, OnlineSoftmaxStats, add_tile, jsd
from tip_exp.losses.tiling import GROUP, Workspace, tiling
from tip_exp.losses.top_tokens import TOP_TOKEN_STATISTICS, top_token_statistics
from tip_exp.selector.scores import STUDENT_STATISTICS

Statistics = dict[str, Tensor]  # name in scores.STATISTICS -> (N,)

WHOLE_ROW_STATISTICS = TOP_TOKEN_STATISTICS | {"jsd"}  # need all logits of a token at once


@dataclass(frozen=True, slots=True)
class TokenStats:
    """`values`: the wanted statistics. `log_normalizers`: reused by the loss; None if the teacher was not projected."""

    values: Statistics
    log_normalizers: LogNormalizers | None


@torch.no_grad()
def token_stats(
    student: LazyLogits,
    teacher: LazyLogits,
    token_ids: Int[Tensor, " n"],
    *,
    wanted: frozenset[str],
    tile_bytes: int,
    jsd_beta: float = 0.5,
    top_k: int = 10,
) -> TokenStats:
    """Statistics of the N response tokens `token_ids`, by one GEMM with each head; names as in scores.STATISTICS.

    The teacher is projected only if a wanted statistic needs it. Vocabulary-sized memory is one tile per model, which
    holds whole rows if `wanted` includes any of WHOLE_ROW_STATISTICS. Raises ValueError for ids outside the vocabulary.
    """
    assert len(student) == len(teacher) == len(token_ids), "one hidden state per token and model"
    head, device = student.head, student.hidden.device
    needs_teacher, whole_rows = bool(wanted - STUDENT_STATISTICS), bool(wanted & WHOLE_ROW_STATISTICS)
    if needs_teacher:
        check_same_tokens(head, teacher.head)
    models = [student, teacher] if needs_teacher else [student]
    if len(token_ids) == 0:
        empty = torch.zeros(0, dtype=head.dtype, device=device)
        return TokenStats(dict.fromkeys(wanted, empty), LogNormalizers(*[empty] * 4) if needs_teacher else None)
    check_ids(token_ids, head.vocab_size)
    cut = tiling(len(token_ids), head.vocab_size, head.dtype, tile_bytes, whole_rows=whole_rows, device=device.type)
    options = {"with_gradient": "grad_norm" in wanted, "jsd_beta": jsd_beta if "jsd" in wanted else None}
    num_scratch = 5 if wanted & {"grad_norm", "jsd"} else 4
    workspace = Workspace(cut, head.dtype, device, num_scratch=num_scratch, tiles=len(models))
    top_wanted = wanted & TOP_TOKEN_STATISTICS
    num_groups = cut.vocab_size // GROUP if top_wanted else 0
    group_maxima = torch.empty(2, cut.height, num_groups, dtype=head.dtype, device=device)
    values: list[Statistics] = []
    normalizers: list[LogNormalizers] = []
    for rows in cut.rows():
        tile_ids = token_ids[rows]
        tile_maxima = group_maxima[:, : len(tile_ids)]
        sums, tile_values = _row_sums([model[rows] for model in models], tile_ids, workspace, tile_maxima, **options)
        if needs_teacher:
            normalizers.append(LogNormalizers.of(*sums))
            tile_values["reverse_kl"] = normalizers[-1].reverse_kl.clamp(min=0)  # rounding can make it negative
            tile_values["forward_kl"] = normalizers[-1].forward_kl.clamp(min=0)
        if "jsd" in wanted:
            tile_values["jsd"] = jsd(sums[0], sums[1], jsd_beta).clamp(min=0)
        if top_wanted:
            z, t = workspace.tiles(len(tile_ids), slice(0, cut.vocab_size))
            log_normalizer = sums[1].log_normalizer
            tile_values |= top_token_statistics(
                z, t, log_normalizer, tile_ids, tile_maxima, workspace, overlap_k=top_k, wanted=top_wanted
            )
        values.append({name: tile_values[name] for name in wanted})
    joined = {name: torch.cat([tile[name] for tile in values]).to(head.dtype) for name in wanted}
    log_normalizers = LogNormalizers(*map(torch.cat, zip(*normalizers, strict=True))) if needs_teacher else None
    return TokenStats(joined, log_normalizers)


def check_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError if an id is outside the shared vocabulary. On CUDA a device-side assert, without a sync."""
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if token_ids.is_cuda:
        message = f"a token id is not one of the {vocab_size} ids that both models have"
        torch.ops.aten._assert_async.msg(~outside.any(), message)
    elif bool(outside.any()):
        raise ValueError(
            f"token id {int(token_ids[outside][0])} is not one of the {vocab_size} ids that both models have; a model "
            "whose logits are wider than the other's can sample one: choose a pair of equal width"
        )


@torch.no_grad()
def top_tokens(
    hidden: Float[Tensor, "n d"], head: Head, k: int, tile_bytes: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """A model's k most likely next tokens at N positions and their probabilities, tile by tile."""
    height = tiling(len(hidden), head.vocab_size, head.dtype, tile_bytes, whole_rows=True).height
    k = min(k, head.vocab_size)
    tiles = [head.logits(tile_hidden).log_softmax(-1).topk(k) for tile_hidden in hidden.split(height)]
    return torch.cat([tile.indices for tile in tiles]), torch.cat([tile.values.exp() for tile in tiles])


def _row_sums(
    models: list[LazyLogits], token_ids: Tensor, workspace: Workspace, group_maxima: Tensor, **options: Any
) -> tuple[list[OnlineSoftmaxStats], Statistics]:
    """Each model's sums over the vocabulary at one tile's rows, and its statistics; `options` as in `add_tile`."""
    sums: list[OnlineSoftmaxStats] = []
    sampled_logits = group_maxima.new_zeros(len(models), len(token_ids))
    for columns in workspace.cut.columns():
        tiles = project(models, columns, workspace)
        sums = add_tile(sums, tiles, workspace, group_maxima, **options)
        for logits, tile in zip(sampled_logits, tiles, strict=True):
            logits += _sampled_logit(tile, token_ids - columns.start)
    names = (("entropy", "student_logprob"), ("teacher_entropy", "teacher_logprob"))
    statistics: Statistics = {}
    for (entropy, logprob), model_sums, logits in zip(names, sums, sampled_logits, strict=False):
        statistics |= {entropy: model_sums.entropy, logprob: logits - model_sums.log_normalizer}
    if sums[0].gradient is not None:
        statistics["grad_norm"] = sums[0].gradient.norm
    return sums, statistics


def _sampled_logit(tile: Tensor, ids: Tensor) -> Tensor:
    """tile[i, ids[i]], or 0 where ids[i] is not a column of the tile."""
    inside = (ids >= 0) & (ids < tile.shape[-1])
    logits = tile.gather(-1, ids.clamp(0, tile.shape[-1] - 1)[:, None]).squeeze(-1)
    return torch.where(inside, logits, 0)
