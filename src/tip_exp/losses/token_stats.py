"""Full-vocabulary statistics of every response token under both models, in one pass without gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp.losses import online_softmax
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.losses.online_softmax import LogNormalizers, OnlineSoftmaxStats
from tip_exp.losses.tiling import GROUP, Tiling, Workspace, tiling
from tip_exp.selector.scores import STUDENT_STATISTICS

Statistics = dict[str, Tensor]  # name in scores.STATISTICS -> (N,)

WHOLE_ROW_STATISTICS = frozenset({"jsd", "topk_overlap"})  # need all logits of a token at once


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
    holds whole rows if `wanted` includes any of WHOLE_ROW_STATISTICS.
    """
    assert len(student) == len(teacher) == len(token_ids), "one hidden state per token and model"
    head, device = student.head, student.hidden.device
    needs_teacher, whole_rows = bool(wanted - STUDENT_STATISTICS), bool(wanted & WHOLE_ROW_STATISTICS)
    models = [student, teacher] if needs_teacher else [student]
    if len(token_ids) == 0:
        empty = torch.zeros(0, dtype=head.dtype, device=device)
        return TokenStats(dict.fromkeys(wanted, empty), LogNormalizers(*[empty] * 4) if needs_teacher else None)
    cut = tiling(len(token_ids), head.vocab_size, head.dtype, tile_bytes, whole_rows=whole_rows, device=device.type)
    workspace = Workspace(cut, head.dtype, device, num_scratch=3, tiles=len(models))
    group_maxima = None  # (model, row, group)
    if "topk_overlap" in wanted:
        group_maxima = torch.empty(2, cut.height, cut.vocab_size // GROUP, dtype=head.dtype, device=device)
    values: list[Statistics] = []
    normalizers: list[LogNormalizers] = []
    for rows in cut.rows():
        tile_maxima = None if group_maxima is None else group_maxima[:, : rows.stop - rows.start]
        sums = _sums([model[rows] for model in models], token_ids[rows], cut, workspace, tile_maxima)
        tile_values = dict(sums.statistics(wanted))
        if sums.teacher is not None:
            normalizers.append(LogNormalizers.of(sums.student, sums.teacher))
        if whole_rows:
            k = min(top_k, cut.vocab_size)
            tile_values |= _whole_row_statistics(sums, wanted, jsd_beta, k, cut, workspace, tile_maxima)
        values.append(tile_values)
    joined = {name: torch.cat([tile[name] for tile in values]).to(head.dtype) for name in wanted}
    return TokenStats(joined, LogNormalizers.concatenate(normalizers) if needs_teacher else None)


@torch.no_grad()
def top_tokens(
    hidden: Float[Tensor, "n d"], head: Head, k: int, tile_bytes: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """A model's k most likely next tokens at N positions and their probabilities, tile by tile."""
    k = min(k, head.vocab_size)
    if len(hidden) == 0:
        empty = torch.zeros(0, k, device=hidden.device)
        return empty.long(), empty
    cut = tiling(len(hidden), head.vocab_size, head.dtype, tile_bytes, whole_rows=True)
    tiles = [head.logits(hidden[rows]).log_softmax(-1).topk(k) for rows in cut.rows()]
    return torch.cat([tile.indices for tile in tiles]), torch.cat([tile.values.exp() for tile in tiles])


def normalized_entropy(entropy: Float[Tensor, " n"], vocab_size: int) -> Float[Tensor, " n"]:
    """H / ln V, in [0, 1]: TIP, Eq. 2."""
    return entropy / math.log(vocab_size)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Softmax sums of n tokens over some vocabulary columns."""

    student: OnlineSoftmaxStats
    teacher: OnlineSoftmaxStats | None
    sampled_logits: tuple[Tensor, ...]  # student's, teacher's logit of the sampled token; 0 if not in these columns

    def merge(self, sums: _Sums) -> _Sums:
        """The sums over the union of two disjoint sets of columns."""
        teacher = None if self.teacher is None or sums.teacher is None else self.teacher.merge(sums.teacher)
        sampled_logits = tuple(a + b for a, b in zip(self.sampled_logits, sums.sampled_logits, strict=True))
        return _Sums(self.student.merge(sums.student), teacher, sampled_logits)

    def statistics(self, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """The wanted statistics that follow from the sums over the whole vocabulary."""
        student, teacher = self.student, self.teacher
        if "entropy" in wanted:
            yield "entropy", student.entropy
        if "student_logprob" in wanted:
            yield "student_logprob", self.sampled_logits[0] - student.log_normalizer
        if teacher is None:
            return
        if "teacher_entropy" in wanted:
            yield "teacher_entropy", teacher.entropy
        if "teacher_logprob" in wanted:
            yield "teacher_logprob", self.sampled_logits[1] - teacher.log_normalizer
        if "reverse_kl" in wanted:
            yield "reverse_kl", student.kl(teacher).clamp_(min=0)  # rounding can make it negative
        if "forward_kl" in wanted:
            yield "forward_kl", teacher.kl(student).clamp_(min=0)


def _sums(
    models: list[LazyLogits], token_ids: Tensor, cut: Tiling, workspace: Workspace, group_maxima: Tensor | None
) -> _Sums:
    """Softmax sums of one tile's rows over the whole vocabulary; fills `group_maxima` (model, row, group)."""
    sums: _Sums | None = None
    for columns in cut.columns():
        tiles = [workspace.tile(i, len(token_ids), columns) for i in range(len(models))]
        for model, tile in zip(models, tiles, strict=True):
            model.into(tile, columns)
        groups = slice(columns.start // GROUP, columns.stop // GROUP)
        maxima = None if group_maxima is None else tuple(group_maxima[:, :, groups])
        stats = online_softmax.tile_stats(*tiles, workspace=workspace, group_maxima=maxima)
        part = _Sums(*stats, tuple(_sampled_logit(tile, token_ids - columns.start) for tile in tiles))
        sums = part if sums is None else sums.merge(part)
    assert sums is not None, "a vocabulary has at least one column"
    return sums


def _sampled_logit(tile: Tensor, ids: Tensor) -> Tensor:
    """tile[i, ids[i]], or 0 where ids[i] is not a column of the tile."""
    inside = (ids >= 0) & (ids < tile.shape[-1])
    logits = tile.gather(-1, ids.clamp(0, tile.shape[-1] - 1)[:, None]).squeeze(-1)
    return torch.where(inside, logits, 0)


def _whole_row_statistics(
    sums: _Sums,
    wanted: frozenset[str],
    jsd_beta: float,
    k: int,
    cut: Tiling,
    workspace: Workspace,
    group_maxima: Tensor | None,
) -> Statistics:
    """Statistics that need both models' whole rows of logits, which the workspace's tiles hold."""
    assert sums.teacher is not None, "the teacher was projected"
    z, t = (workspace.tile(model, len(sums.student.max), slice(0, cut.vocab_size)) for model in (0, 1))
    statistics: Statistics = {}
    if "jsd" in wanted:
        statistics["jsd"] = online_softmax.jsd(z, t, sums.student, sums.teacher, jsd_beta, workspace).clamp(min=0)
    if group_maxima is not None:
        student_top, teacher_top = _top_ids(z, group_maxima[0], k), _top_ids(t, group_maxima[1], k)
        in_both = (student_top[:, :, None] == teacher_top[:, None, :]).any(-1)
        statistics["topk_overlap"] = in_both.double().mean(-1)
    return statistics


def _top_ids(logits: Tensor, group_maxima: Tensor, k: int) -> Tensor:
    """Token ids of each row's k largest logits, (n, k).

    They lie in the k groups with the largest maxima (or the columns after the last full group), so only those are read.
    """
    num_groups, device = group_maxima.shape[1], logits.device
    top_groups = group_maxima.topk(min(k, num_groups)).indices
    grouped_ids = top_groups[:, :, None] * GROUP + torch.arange(GROUP, device=device)
    ungrouped_ids = torch.arange(num_groups * GROUP, logits.shape[1], device=device).expand(len(logits), -1)
    candidates = torch.cat([grouped_ids.flatten(1), ungrouped_ids], -1)
    return candidates.gather(-1, logits.gather(-1, candidates).topk(k).indices)
