"""What every response token looks like to both models: full-vocabulary statistics in one pass, without gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp.losses import online_softmax as moments
from tip_exp.losses.head import Head
from tip_exp.losses.online_softmax import Normalizers, OnlineSoftmaxStats
from tip_exp.losses.tiling import GROUP, Workspace, tiling
from tip_exp.selector.scores import STUDENT_STATISTICS

Statistics = dict[str, Tensor]  # name in scores.STATISTICS -> (N,)

WHOLE_ROWS = frozenset({"jsd", "topk_overlap"})  # need all logits of a token at once


@dataclass(frozen=True, slots=True)
class Scored:
    """The wanted statistics, and the normalisers the loss takes over; None if the teacher was not projected."""

    statistics: Statistics
    normalizers: Normalizers | None


@torch.no_grad()
def measure(
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
) -> Scored:
    """Statistics and normalisers of N response tokens by one product with each head.

    `student_hidden` and `teacher_hidden` are the final hidden states that predict `token_ids`. The teacher is
    projected only if a wanted statistic needs it. Beyond the tiles nothing of the vocabulary's size is held; with what
    needs a token's whole row (`WHOLE_ROWS`) a tile is whole rows.
    """
    both, whole = bool(wanted - STUDENT_STATISTICS), bool(wanted & WHOLE_ROWS)
    size = len(token_ids), student_head.vocab_size, student_head.dtype, tile_bytes
    cut = tiling(*size, whole_rows=whole, device=student_hidden.device.type)
    work = Workspace(cut, student_hidden, student_head.dtype, spare=3, tiles=1 + both)
    models = [(student_hidden, student_head), (teacher_hidden, teacher_head)][: 1 + both]
    maxima = None
    if "topk_overlap" in wanted:
        maxima = torch.empty(2, cut.height, cut.vocab_size // GROUP, dtype=student_head.dtype, device=token_ids.device)
    found: list[Statistics] = []
    known: list[Normalizers] = []
    for rows in cut.rows():
        ids, sums = token_ids[rows], None
        for columns in cut.columns():
            tiles = [work.tile(i, len(ids), columns) for i in range(len(models))]
            for tile, (hidden, head) in zip(tiles, models, strict=True):
                head.logits_into(tile, hidden[rows], columns)
            groups = slice(columns.start // GROUP, columns.stop // GROUP)
            here = None if maxima is None else tuple(maxima[:, : len(ids), groups])
            sampled = tuple(_sampled(tile, ids - columns.start) for tile in tiles)
            part = _Columns(*moments.of_tile(*tiles, work=work, maxima=here), sampled)
            sums = part if sums is None else sums.merged(part)
        assert sums is not None, "a vocabulary has at least one column"
        statistics = dict(sums.statistics(wanted))
        if sums.teacher is not None:
            known.append(moments.normalizers(sums.student, sums.teacher))
        if whole:
            z, t = (work.tile(i, len(ids), slice(0, cut.vocab_size)) for i in (0, 1))
            statistics |= _of_whole_rows(z, t, sums, wanted, jsd_beta, min(top_k, cut.vocab_size), maxima, work)
        found.append(statistics)
    if not found:
        nothing = torch.zeros(0, dtype=student_head.dtype, device=student_hidden.device)
        return Scored({name: nothing for name in wanted}, Normalizers(*[nothing] * 4) if both else None)
    joined = {name: torch.cat([tile[name] for tile in found]).to(student_head.dtype) for name in wanted}
    return Scored(joined, moments.joined(known) if both else None)


@torch.no_grad()
def top_tokens(
    hidden: Float[Tensor, "n d"], head: Head, k: int, tile_bytes: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """A model's k likeliest next tokens at N positions, and their probabilities, tile by tile."""
    k = min(k, head.vocab_size)
    cut = tiling(len(hidden), head.vocab_size, head.dtype, tile_bytes, whole_rows=True)
    tiles = [head.logits(hidden[rows]).log_softmax(-1).topk(k) for rows in cut.rows()]
    if not tiles:
        nothing = torch.zeros(0, k, device=hidden.device)
        return nothing.long(), nothing
    return torch.cat([tile.indices for tile in tiles]), torch.cat([tile.values.exp() for tile in tiles])


def normalized_entropy(entropy: Tensor, vocab_size: int) -> Tensor:
    """H / ln V, in [0, 1]: TIP, Eq. 2."""
    return entropy / math.log(vocab_size)


@dataclass(frozen=True, slots=True)
class _Columns:
    """What some vocabulary columns tell about n tokens."""

    student: OnlineSoftmaxStats
    teacher: OnlineSoftmaxStats | None
    sampled: tuple[Tensor, ...]  # logit of the sampled token: student's, teacher's; zero in columns without it

    def merged(self, more: _Columns) -> _Columns:
        teacher = None if self.teacher is None or more.teacher is None else self.teacher.merged(more.teacher)
        sampled = tuple(a + b for a, b in zip(self.sampled, more.sampled, strict=True))
        return _Columns(self.student.merged(more.student), teacher, sampled)

    def statistics(self, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        student, teacher = self.student, self.teacher
        if "entropy" in wanted:
            yield "entropy", student.entropy
        if "student_logprob" in wanted:
            yield "student_logprob", self.sampled[0] - student.log_normalizer
        if teacher is None:
            return
        if "teacher_entropy" in wanted:
            yield "teacher_entropy", teacher.entropy
        if "teacher_logprob" in wanted:
            yield "teacher_logprob", self.sampled[1] - teacher.log_normalizer
        if "reverse_kl" in wanted:
            yield "reverse_kl", student.kl(teacher).clamp_(min=0)  # rounding can go below
        if "forward_kl" in wanted:
            yield "forward_kl", teacher.kl(student).clamp_(min=0)


def _sampled(tile: Tensor, ids: Tensor) -> Tensor:
    inside = (ids >= 0) & (ids < tile.shape[-1])
    logits = tile.gather(-1, ids.clamp(0, tile.shape[-1] - 1)[:, None]).squeeze(-1)
    return torch.where(inside, logits, 0)


def _of_whole_rows(
    z: Tensor,
    t: Tensor,
    sums: _Columns,
    wanted: frozenset[str],
    jsd_beta: float,
    k: int,
    maxima: Tensor | None,
    work: Workspace,
) -> Statistics:
    """What both models' logits of whole rows tell beyond their sums; `maxima` of both, if the overlap is wanted."""
    assert sums.teacher is not None, "the teacher was projected"
    statistics: Statistics = {}
    if "jsd" in wanted:
        statistics["jsd"] = moments.jsd(z, t, sums.student, sums.teacher, jsd_beta, work).clamp(min=0)
    if maxima is not None:
        ours, theirs = _likeliest(z, maxima[0, : len(z)], k), _likeliest(t, maxima[1, : len(t)], k)
        statistics["topk_overlap"] = (ours[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1)
    return statistics


def _likeliest(logits: Tensor, maxima: Tensor, k: int) -> Tensor:
    """Token ids of the k largest of whole rows, (n, k); `maxima` are those of whole groups of columns.

    They lie in the k groups whose maxima are largest, so few logits are read again, and sorted.
    """
    groups, device = maxima.shape[1], logits.device
    chosen = maxima.topk(min(k, groups)).indices[:, :, None] * GROUP + torch.arange(GROUP, device=device)
    rest = torch.arange(groups * GROUP, logits.shape[1], device=device).expand(len(logits), -1)
    ids = torch.cat([chosen.flatten(1), rest], -1)
    return ids.gather(-1, logits.gather(-1, ids).topk(k).indices)
